"""Answers and networks that tests of defences make up."""

from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from tests.conftest import RECIPE
from undistill.data import Samples, Split
from undistill.defences import Defence
from undistill.defences.defence import ResponseDefence
from undistill.training.fit import Fit
from undistill.victims.answer import Answer
from undistill.victims.protected import Protected, Response

CPU = torch.device("cpu")
BLANK = torch.zeros(1, 1, 12, 12)


def drawn(rows: int, classes: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Random probabilities (rows, classes) in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=generator, dtype=torch.double)).softmax(1)


def shown(p: Tensor) -> Answer:
    return Answer.of_logits(p.log())


def response(text: str, classes: int, shape: tuple[int, int, int] = (1, 12, 12)) -> Response:
    defence = Defence.parse(text)
    assert isinstance(defence, ResponseDefence)
    return defence.response(shape, classes)


def changed(text: str, p: Tensor) -> Tensor:
    """The probabilities that a response makes of `p`."""
    return response(text, p.shape[1])(shown(p), BLANK.expand(len(p), -1, -1, -1)).log_p.double().exp()


def fixed(p: Tensor) -> nn.Module:
    """A network that answers the probabilities `p`, one row for each image."""

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return p.log().float()[: len(images)]

    return Fixed()


def calibrated(text: str, p: Tensor, labels: Tensor) -> Protected:
    """A network that answers `p` (N, K) to N images in turn, with a response that was calibrated on them."""
    samples = Samples(torch.arange(len(p), dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4), labels)
    split = Split(tuple(map(str, range(p.shape[1]))), samples, samples)
    protected = Defence.parse(text).protect(Numbered(p), Numbered(p), Numbered, split, Fit(RECIPE, 0, CPU))  # type: ignore[arg-type]
    assert isinstance(protected, Protected)
    return protected


class Numbered(nn.Module):
    """Answers the image whose pixels are n / 255 with row n of `p`."""

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.p = p

    def forward(self, images: Tensor) -> Tensor:
        return self.p.log().float()[(255 * images[:, 0, 0, 0]).round().long()]


def l1_program(cost: np.ndarray[Any, Any], y: np.ndarray[Any, Any], epsilon: float, top: int | None) -> float:
    """min cost'y' within ||y' - y||_1 <= epsilon on the simplex, by a linear program; `top` stays, by 1e-4."""
    K, eye = len(y), np.eye(len(y))
    rows = [np.r_[s * eye[k], -eye[k]] for s in (1, -1) for k in range(K)] + [np.r_[np.zeros(K), np.ones(K)]]
    bounds = [*y, *-y, epsilon]
    if top is not None:
        rows += [np.r_[eye[k] - eye[top], np.zeros(K)] for k in range(K) if k != top]
        bounds += [-1e-4] * (K - 1)
    ones = [np.r_[np.ones(K), np.zeros(K)]]
    return float(linprog(np.r_[cost, np.zeros(K)], rows, bounds, ones, [1], [(0, None)] * (2 * K)).fun)
