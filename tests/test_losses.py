import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undistill.core.unshown import LOG_ZERO
from undistill.training.losses import cross_entropy, distillation, kl, undermining


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def published(z_n: np.ndarray, z_a: np.ndarray, y: np.ndarray, omega: float, T: float) -> float:
    """Equation 2 of the paper, written out in float64 without any logarithm trick."""
    p, q = softmax(z_n / T), softmax(z_a / T)
    ce = -np.log(softmax(z_n)[np.arange(len(y)), y]).mean()
    return float(ce - omega * T**2 * (p * np.log(p / q)).sum(1).mean())


def test_kl_by_hand() -> None:
    p, q = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    assert kl(p, q).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert kl(q, p).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_smoothed_cross_entropy_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    target = (0.7 + 0.1, 0.1, 0.1)  # smoothing 0.3 over three classes
    expected = -sum(t * math.log(p) for t, p in zip(target, (0.7, 0.2, 0.1), strict=True))
    assert cross_entropy(logits, torch.tensor([0]), 0.3).item() == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0.001, 1), st.floats(0.5, 30))
def test_self_undermining_loss_is_the_published_formula(seed: int, classes: int, omega: float, T: float) -> None:
    random = np.random.default_rng(seed)
    z_n, z_a = random.normal(0, 3, (2, 5, classes))
    y = random.integers(0, classes, 5)
    nasty, adversary = torch.tensor(z_n), torch.tensor(z_a)
    ours = cross_entropy(nasty, torch.tensor(y)) + omega * undermining(nasty, adversary, T)
    assert ours.item() == pytest.approx(published(z_n, z_a, y, omega, T), rel=1e-3, abs=1e-4)


def test_gradient_reaches_the_nasty_network_alone() -> None:
    nasty, adversary = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    undermining(nasty, adversary, 4.0).backward()
    assert nasty.grad is not None
    assert nasty.grad.abs().sum() > 0
    assert adversary.grad is None


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0.5, 30), st.floats(0.1, 100))
def test_undermining_is_bounded_by_the_adversarys_least_likely_class(seed: int, T: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    nasty, adversary = (scale * torch.randn(1, 6, generator=generator) for _ in range(2))
    bound = -T * T * torch.log_softmax(adversary / T, 1).min()
    assert -undermining(nasty, adversary, T) <= bound * (1 + 1e-5) + 1e-4


def test_log_probabilities_are_logits() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.allclose(distillation(a.log_softmax(1), b, 4.0), distillation(a, b, 4.0), atol=1e-5)


def test_truncated_answers_stay_finite() -> None:
    truncated = torch.tensor([[0.0, LOG_ZERO, LOG_ZERO]])
    assert kl(truncated, torch.randn(1, 3), 4.0).isfinite()
    assert kl(torch.randn(1, 3), truncated, 4.0).isfinite()


def test_losses_are_fp32_whatever_comes_in() -> None:
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(5, 7).bfloat16()
    assert kl(a, b, 4.0).dtype == torch.float32
    assert kl(a, b, 4.0) == kl(a.float(), b.float(), 4.0)
