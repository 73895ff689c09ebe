"""Every loss of the project. One tempered KL; all of them in fp32, whatever the networks ran in."""

import torch
import torch.nn.functional as F
from torch import Tensor

from undistill.core.errors import NonFinite
from undistill.core.unshown import LOG_ZERO, UNSHOWN

LARGEST = 1e15  # of an answer


def kl(p: Tensor, q: Tensor, T: float = 1.0) -> Tensor:
    """KL( softmax(p/T) || softmax(q/T) ), mean over the batch.

    p, q: (B, K) logits; log-probabilities are logits, too. Returns a scalar, in nats.
    """
    log_p = F.log_softmax(p.float() / T, dim=1)
    log_q = F.log_softmax(q.float() / T, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of (B, K) logits with (B,) class indices or (B, K) shares, mean over the batch.

    `smoothing` spreads that share of the target evenly over all K classes (Szegedy 2016).
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def distillation(teacher: Tensor, student: Tensor, T: float) -> Tensor:
    """T^2 KL(teacher/T || student/T): the soft term of Hinton, Vinyals and Dean (2015)."""
    return T * T * kl(teacher, student, T)


def undermining(nasty: Tensor, adversary: Tensor, T: float) -> Tensor:
    """-T^2 KL(nasty/T || adversary/T): the self-undermining term (Ma et al., ICLR 2021, eq. 2).

    The adversary is frozen; no gradient reaches it. For a fixed adversary q the divergence of one
    sample is at most -T^2 log min_k q_k, since KL(p || q) <= max_k log(1/q_k).
    """
    return -T * T * kl(nasty, adversary.detach(), T)


def conditional_information(logits: Tensor, labels: Tensor) -> Tensor:
    """I(X; answer | label) of answers (N, K) to images with `labels` (N,), in nats.

    It is the mean KL of each answer to the mean answer of its class. Ye et al. (2025) and Fang et al. (2026)
    minimise it, since it is what imitation learns beyond the label.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    shares = F.one_hot(labels, logits.shape[1]).to(log_p.dtype)
    means = shares.T @ log_p.exp() / shares.sum(0)[:, None].clamp_min(1)
    return kl(log_p, means.clamp_min(1e-30).log()[labels])


def misinformation(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p_y + 1e-7), mean over the batch: low for answers (B, K) that are wrong about `labels` (B,).

    Kariyappa and Qureshi (CVPR 2020), the reverse cross-entropy. `labels` may be shares (B, K).
    """
    p = F.softmax(logits.float(), dim=1)
    of_labels = (p * labels).sum(1) if labels.ndim == 2 else p.gather(1, labels[:, None]).squeeze(1)
    return -(1 - of_labels + 1e-7).log().mean()


def filled(served: Tensor) -> Tensor:
    """`served` (B, K) with probabilities for the classes at `UNSHOWN`: they share what is left of 1 evenly.

    Logits and answers in which every class was shown are returned as they are.
    """
    hidden = served == UNSHOWN
    left = (1 - served.masked_fill(hidden, -torch.inf).exp().sum(1, keepdim=True)).clamp_min(0)
    share = (left / hidden.sum(1, keepdim=True).clamp_min(1)).log().clamp_min(LOG_ZERO)
    return torch.where(hidden, share, served)


def require_finite(logits: Tensor, what: str) -> Tensor:
    """`logits` (N, K); `NonFinite` if any is NaN, infinite, or so large that measurements of it would be."""
    broken = int((~(logits.abs() <= LARGEST)).any(1).sum())
    if broken:
        raise NonFinite(
            f"The network answers NaN or infinity to {broken} of {len(logits)} {what}; its weights are not usable."
        )
    return logits
