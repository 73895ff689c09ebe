"""What images are made by, against values that were computed by hand."""

import math

import pytest
import torch
from torch import nn

from undistill.attacks.dafl import DAFL
from undistill.synthesis import BatchNormStatistics, disagreement, total_variation


def test_batch_norm_statistics_are_distances_of_means_and_of_variances() -> None:
    """Means 1 and -2 against 0 and 0: sqrt(5); variances 1 and 4 against 1 and 1: 3."""
    norm = nn.BatchNorm1d(2).eval()
    with BatchNormStatistics(norm) as statistics:
        norm(torch.tensor([[0.0, -4.0], [2.0, 0.0]]))
        assert statistics.found
        assert statistics.distance == pytest.approx(math.sqrt(5) + 3)


def test_batch_norm_statistics_leave_the_network_as_it_was() -> None:
    norm = nn.BatchNorm1d(2).eval()
    with BatchNormStatistics(norm) as statistics:
        pass
    norm(torch.ones(3, 2))
    assert statistics.distance == 0


def test_total_variation_is_the_mean_step_between_neighbours() -> None:
    """Down: 0, 3 -> mean 1.5; across: 1, 4 -> mean 2.5."""
    assert total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 4.0]]]])) == pytest.approx(1.5 + 2.5)


def test_disagreement_is_one_less_for_each_bit_of_jensen_and_shannon() -> None:
    sure, other = torch.tensor([[400.0, 0.0]]), torch.tensor([[0.0, 400.0]])
    assert disagreement(sure, sure) == pytest.approx(1)
    assert disagreement(sure, other, T=1) == pytest.approx(0, abs=1e-6)
    # (1, 0) against (1/2, 1/2): H(3/4, 1/4) - 1/2 bits
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert disagreement(sure, torch.zeros(1, 2), T=1) == pytest.approx(1 - bits)


def test_disagreement_has_a_gradient_however_sure_the_answers_are() -> None:
    logits = torch.tensor([[4000.0, 0.0]], requires_grad=True)
    disagreement(logits, torch.tensor([[0.0, 4000.0]])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_dafl_wants_sure_varied_answers_and_active_features() -> None:
    """Answers (1, 0) and (0, 1): one-hot 0, entropy log 2; features 1 and 3: mean 2."""
    answers, features = torch.tensor([[400.0, 0.0], [0.0, 400.0]]), torch.tensor([[1.0], [-3.0]])
    attack = DAFL(one_hot=1, entropy=5, activation=0.1)
    assert attack._loss(answers, [features]) == pytest.approx(-5 * math.log(2) - 0.2, abs=1e-5)
    unsure = attack._loss(torch.zeros(2, 2), [])
    assert unsure == pytest.approx(math.log(2) - 5 * math.log(2))
