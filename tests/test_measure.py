import math

import pytest
import torch
from torch import nn

from undistill.data import Samples
from undistill.training.metrics import accuracy, ece, evaluate, fidelity, l1, nll


def logits(*probabilities: list[float]) -> torch.Tensor:
    return torch.log(torch.tensor(probabilities))


ANSWERS = logits([0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7])
LABELS = torch.tensor([0, 1, 1, 1])


def test_by_hand() -> None:
    assert accuracy(ANSWERS, LABELS) == 0.75
    assert nll(ANSWERS, LABELS) == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.8, 0.7))) / 4)
    assert fidelity(ANSWERS, logits([0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9])) == 0.75
    assert l1(logits([0.9, 0.1]), logits([0.6, 0.4])) == pytest.approx(0.6)


def test_a_label_served_as_0_does_not_decide_the_likelihood_alone() -> None:
    """Epsilon of float32 stands for 0: one of two labels at 0.5, the other at -log(2^-23)."""
    answers = torch.tensor([[math.log(0.5), math.log(0.5)], [0.0, -1e4]])
    assert nll(answers, torch.tensor([0, 1])) == pytest.approx((math.log(2) + 23 * math.log(2)) / 2)
    assert str(nll(answers, torch.tensor([0, 0]))) != "-0.0"
    assert str(nll(answers[1:], torch.tensor([0]))) == "0.0"


def test_ece_by_hand() -> None:
    # Four confidences in four bins: |1 - .9| + |0 - .6| + |1 - .8| + |1 - .7|, each a quarter of the samples.
    assert ece(ANSWERS, LABELS) == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)
    # Two samples share a bin: their average confidence is compared with their average accuracy.
    assert ece(logits([0.61, 0.39], [0.62, 0.38]), torch.tensor([0, 1])) == pytest.approx(0.115)


def test_evaluate_is_batched_and_restores_the_mode() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    samples = Samples(torch.randint(0, 256, (7, 1, 2, 2), dtype=torch.uint8), torch.arange(7))
    assert torch.allclose(evaluate(network, samples, batch_size=3), evaluate(network, samples), atol=1e-6)
    assert network.training
