import math

import pytest
import torch
from torch import nn

from undistill.data import Samples
from undistill.training import metrics
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


def test_brier_and_top_k_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    labels = torch.tensor([0, 1])
    assert metrics.brier(p.log(), labels) == pytest.approx(((0.09 + 0.04 + 0.01) + (0.0625 + 0.5625 + 0.25)) / 2)
    assert metrics.top_k(p.log(), labels, k=1) == 0.5
    assert metrics.top_k(p.log(), labels, k=2) == pytest.approx(0.75), "among equal answers it is by chance"
    assert metrics.top_k(p.log(), labels, k=5) == 1


def test_accuracy_where_a_network_is_surest_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 0])  # right, wrong, right, wrong
    assert metrics.selective_accuracy(p.log(), labels, coverage=0.25) == 1
    assert metrics.selective_accuracy(p.log(), labels, coverage=0.5) == 0.5
    assert metrics.selective_accuracy(p.log(), labels, coverage=0.75) == pytest.approx(2 / 3)
    equal = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]])
    assert metrics.selective_accuracy(equal.log(), torch.tensor([0, 0, 1, 1]), coverage=0.5) == pytest.approx(
        (1 + 1 / 3) / 2
    )


def test_accuracy_of_each_class_and_its_loss_by_hand() -> None:
    answers = torch.eye(3)[[0, 0, 1, 0]]
    labels = torch.tensor([0, 0, 1, 1])
    assert metrics.class_accuracies(answers, labels) == [1, 0.5, None]
    lost, error = metrics.accuracy_lost(answers, torch.eye(3)[labels], labels)
    assert lost == 0.25
    assert error == pytest.approx(math.sqrt(1 + 1 - 1 / 6) / 6)
    assert metrics.accuracy_lost(answers, answers, labels)[1] > 0, "agreement on few images is no proof of it on others"


def test_a_fitted_temperature_is_the_likeliest() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(answers.softmax(1), 1, generator=generator).flatten()
    assert metrics.fitted_temperature(3 * answers, labels) == pytest.approx(3, rel=0.1)
