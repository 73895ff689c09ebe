"""Metrics of logits or log-probabilities: accuracy, NLL, calibration, agreement, divergence."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undistill.core import distributed
from undistill.data.files import fetched
from undistill.data.split import Samples
from undistill.data.views import to_float
from undistill.models.trial import device_of
from undistill.training.compute import EXACT, Compute
from undistill.training.losses import distillation, filled, require_finite

DIVERGENCE_T = 4.0
COVERAGE = 0.8  # of the samples that are answered, the rest being left to people
LOWEST, HIGHEST = 0.05, 20.0  # of a temperature that is fitted


@torch.no_grad()
def evaluate(network: nn.Module, samples: Samples, compute: Compute = EXACT, batch_size: int = 512) -> Tensor:
    """Logits (N, K) of the unaugmented images, in eval mode, fp32, on the network's device.

    What the interface of a protected network does not show is filled in evenly.

    Raises `NonFinite` for a network that answers NaN or infinity: whatever is measured of it would be meaningless.
    """
    device = device_of(network)
    training = network.training
    network.eval()

    def answers(parts: Sequence[Tensor]) -> Iterator[Tensor]:
        for images in fetched(samples.images, samples.images.__getitem__, parts):
            yield network(compute.laid_out(to_float(images.to(device)))).float()

    with compute.active(device):
        logits = distributed.in_turns(samples.parts(batch_size), answers)
    network.train(training)
    return filled(require_finite(logits, "images")).to(device)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose highest answer is the label."""
    return (logits.argmax(1) == labels).double().mean().item()


def accuracy_lost(after: Tensor, before: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy of `before` minus that of `after`, two answers (N, K) to the same images, and its standard error.

    Half an image is added to each kind of disagreement (Agresti and Min 2005), so that the error is never 0.
    """
    lost = (before.argmax(1) == labels).double() - (after.argmax(1) == labels).double()
    more = len(lost) + 2
    return float(lost.mean()), math.sqrt(float(lost.square().sum() + 1 - lost.sum() ** 2 / more)) / more


def confidence(logits: Tensor) -> float:
    """Mean probability of the highest answer."""
    return logits.softmax(1).amax(1).double().mean().item()


def self_agreement(asked: Sequence[Tensor]) -> float:
    """Share of images to which every answer (N, K) of `asked` has the same top class."""
    tops = torch.stack([logits.argmax(1) for logits in asked])
    return (tops == tops[0]).all(0).double().mean().item()


def fidelity(student: Tensor, victim: Tensor) -> float:
    """Top-1 agreement of two answers (N, K) to the same images."""
    return accuracy(student, victim.argmax(1))


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats, of probabilities no smaller than float32's epsilon.

    A defence that rounds or hides serves 0 for some labels, whose likelihood alone would decide the mean.
    """
    right = F.log_softmax(logits.float(), dim=1).gather(1, labels.unsqueeze(1))
    return 0.0 - right.clamp_min(math.log(torch.finfo(torch.float32).eps)).mean().item()  # 0.0, not -0.0


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error over equal-width confidence bins (Guo et al., ICML 2017)."""
    confidence, answer = F.softmax(logits.double(), dim=1).max(1)
    gap = (answer == labels).double() - confidence
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.double).index_add_(0, which, gap)
    return (sums.abs().sum() / len(labels)).item()


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the one-hot label, 0 to 2 (Brier 1950)."""
    p = F.softmax(logits.double(), dim=1)
    return (p - F.one_hot(labels, p.shape[1])).square().sum(1).mean().item()


def top_k(logits: Tensor, labels: Tensor, k: int = 5) -> float:
    """Share of samples whose label is among the `k` highest answers; among equal ones it is by chance."""
    own = logits.gather(1, labels[:, None])
    higher, equal = (logits > own).sum(1), (logits == own).sum(1)
    return ((k - higher) / equal).clamp(0, 1).double().mean().item()


def selective_accuracy(logits: Tensor, labels: Tensor, coverage: float = COVERAGE) -> float:
    """Accuracy on the share `coverage` of samples whose highest answer is surest; among equally sure ones by chance."""
    sure, right = (1e5 * logits.softmax(1).amax(1)).round(), (logits.argmax(1) == labels).double()
    kept = max(round(coverage * len(labels)), 1)
    least = sure.sort(descending=True).values[kept - 1]
    surer, equal = sure > least, sure == least
    return ((right[surer].sum() + right[equal].mean() * (kept - surer.sum())) / kept).item()


def class_accuracies(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Accuracy on the samples of each class; None for a class that has none."""
    right = logits.argmax(1) == labels
    return [
        right[labels == label].double().mean().item() if (labels == label).any() else None
        for label in range(logits.shape[1])
    ]


def divergence(victim: Tensor, honest: Tensor, T: float = DIVERGENCE_T) -> float:
    """T^2 KL(victim/T || honest/T) of two answers to the same images, in nats: how far a defence went."""
    return distillation(victim, honest, T).item()


def l1(a: Tensor, b: Tensor) -> float:
    """Mean L1 distance of two answers' probabilities, 0 to 2."""
    return (F.softmax(a.double(), 1) - F.softmax(b.double(), 1)).abs().sum(1).mean().item()


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which softmax(logits / T) of (N, K) logits is most likely for `labels` (N,)."""

    from scipy.optimize import minimize_scalar  # here, since every start would wait for it

    def nll(log_T: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log_T), labels))

    return math.exp(minimize_scalar(nll, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded").x)
