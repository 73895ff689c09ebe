"""What is measured of logits or log-probabilities: accuracy, NLL, calibration, agreement, divergence."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undistill.losses import cross_entropy
from undistill.views import to_float


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, batch_size: int = 512) -> Tensor:
    """Logits (N, K) of unaugmented uint8 images, in eval mode, fp32, on the images' device."""
    training = network.training
    network.eval()
    logits = torch.cat([network(to_float(part)).float() for part in images.split(batch_size)])
    network.train(training)
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose highest answer is the label."""
    return (logits.argmax(1) == labels).double().mean().item()


def fidelity(student: Tensor, victim: Tensor) -> float:
    """Top-1 agreement of two answers (N, K) to the same images."""
    return accuracy(student, victim.argmax(1))


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return cross_entropy(logits, labels).item()


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error over equal-width confidence bins (Guo et al., ICML 2017)."""
    confidence, answer = F.softmax(logits.double(), dim=1).max(1)
    gap = (answer == labels).double() - confidence
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.double).index_add_(0, which, gap)
    return (sums.abs().sum() / len(labels)).item()


def l1(a: Tensor, b: Tensor) -> float:
    """Mean L1 distance of two answers' probabilities, 0 to 2."""
    return (F.softmax(a.double(), 1) - F.softmax(b.double(), 1)).abs().sum(1).mean().item()
