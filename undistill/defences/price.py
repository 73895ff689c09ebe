"""A price instead of a weight: training finds the weight of the undermining term by itself.

The owner states how many points of accuracy he accepts to lose. Dual ascent on log omega keeps the cross-entropy of the
protected network within a slack of the honest one's, and short trainings tighten or loosen the slack until the accuracy
lost on validation images is what was stated.
"""

import math
from typing import Any

import torch
from torch import Tensor

START, LOWEST, HIGHEST = 0.01, 1e-6, 1.0  # of omega
RATE = 0.02  # of log omega in a step, at most


class FoundWeight:
    """A weight that rises while a constraint holds and falls while it is broken; carried in checkpoints."""

    def __init__(self, slack: float, device: torch.device, start: float = START) -> None:
        self.slack = slack
        self.log = torch.tensor(math.log(start), device=device)

    def __call__(self, excess: Tensor) -> Tensor:
        """The weight for this step, a scalar; `excess` is that of the constraint `excess <= slack`."""
        weight = self.log.exp()
        held = ((self.slack - excess.detach()) / self.slack).clamp(-1, 1)
        self.log = (self.log + RATE * held).clamp(math.log(LOWEST), math.log(HIGHEST))
        return weight

    @property
    def value(self) -> float:
        return float(self.log.exp())

    def state_dict(self) -> dict[str, Any]:
        return {"log": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log = state["log"].to(self.log)
