"""Decoupled knowledge distillation (Zhao et al., CVPR 2022)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Fresh, QueryAttack, Role, tries
from undistill.core.spec import Temperature, Weight
from undistill.core.unshown import LOG_ZERO
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, kl
from undistill.training.objectives import Terms, Weighted
from undistill.victims.answer import Form
from undistill.victims.oracle import Oracle


class DKD(QueryAttack):
    """`CE + alpha target + beta others`: two divergences, weighted apart (eq. 7).

    `target` compares the probability of the label with that of all other classes together, `others` those classes
    among themselves. Plain distillation weights `others` by what the victim leaves to them, which is little where it
    is sure. The two terms rise to their weights over the first epochs.
    """

    form = Form.TOP
    role = Role.PLAIN
    space = tries(T=(1.0, 4.0, 8.0), beta=(1.0, 2.0, 8.0))
    T: Temperature = 4.0
    alpha: Weight = 1.0
    beta: Weight = 8.0
    warmup: float = Field(1 / 12, ge=0, le=1)
    """Share of the epochs in which both terms rise linearly: 20 of 240 in the paper."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        ask, rise = self.asking(oracle, data), self.warmup * fit.recipe.epochs

        def objective(student: nn.Module, batch: Batch) -> Terms:
            logits, weight = student(batch.images), min((batch.epoch + 1) / rise, 1.0) if rise else 1.0
            target, others = decoupled(ask(batch).filled, logits, batch.labels, self.T)
            return {
                "target": Weighted(target, weight * self.alpha),
                "others": Weighted(others, weight * self.beta),
                "ce": cross_entropy(logits, batch.labels),
            }

        return fit(fresh(), data, objective, capturable=True)


def decoupled(teacher: Tensor, student: Tensor, labels: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """T^2 KL of (label, all others), and T^2 KL among the others; teacher, student: logits (B, K).

    labels: (B,), or shares (B, K), of which the largest counts.
    """
    label = (labels.argmax(1) if labels.ndim == 2 else labels)[:, None]
    places = torch.arange(student.shape[1] - 1, device=label.device)
    others = places + (places >= label)

    def halves(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at temperature 1 of (label, all others), and of the others (B, K - 1)."""
        log_p = F.log_softmax(logits.float() / T, 1)
        rest = log_p.gather(1, others)
        whole = torch.cat([log_p.gather(1, label), rest.logsumexp(1, keepdim=True)], 1)
        return whole.clamp_min(LOG_ZERO), rest

    (target_p, others_p), (target_q, others_q) = halves(teacher), halves(student)
    return T * T * kl(target_p, target_q), T * T * kl(others_p, others_q)
