"""Reverse sigmoid (Lee et al., IEEE S&P Workshops 2019): several answers map to one, and gradients mislead."""

import torch
from pydantic import Field
from torch import Tensor

from undistill.defences.defence import ResponseDefence
from undistill.victims.answer import Answer
from undistill.victims.protected import Response

LEAST = 1e-7  # probability whose log-odds are told from those of 0 and, symmetrically, of 1 less it


class ReverseSigmoid(ResponseDefence):
    """Probabilities are moved against their own log-odds, so that answers that differ come to look alike.

    `y' ~ y - beta (sigmoid(gamma logit(y)) - 1/2)`, renormalised. The top class may change where many are close.
    """

    keeps_top = False
    beta: float = Field(0.21, ge=0, lt=2)
    """0.21 for CIFAR-10 and 0.02 for CIFAR-100 are the published values."""
    gamma: float = Field(0.2, gt=0, le=10)

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Reversed(self.beta, self.gamma)


class Reversed(Response):
    """Probabilities moved against their own log-odds."""

    def __init__(self, beta: float, gamma: float) -> None:
        super().__init__()
        self.beta, self.gamma = beta, gamma

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, gamma={self.gamma:g}"

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        # clipped on both sides: one public version clips odds below 1, and so leaves classes above 0.5 alone
        p = answer.filled.exp().clamp(LEAST, 1 - LEAST)
        moved = (p - self.beta * ((self.gamma * p.logit()).sigmoid() - 0.5)).clamp_min(LEAST)
        return Answer((moved / moved.sum(1, keepdim=True)).log(), torch.ones_like(answer.shown), whole=True)
