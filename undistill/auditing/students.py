"""`Students`: the networks that a thief trains."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from undistill.core.seeds import derive
from undistill.models.model import Model


@dataclass(frozen=True)
class Students:
    """New students for one cell: `Fresh` of an attack."""

    model: Model
    shape: tuple[int, int, int]
    num_classes: int
    seed: int

    def __call__(self, number: int = 0) -> nn.Module:
        role = f"student {number}" if number else "student"
        return self.model.build(self.shape, self.num_classes, derive(self.seed, role))

    def stages(self, network: nn.Module) -> Sequence[nn.Module]:
        return self.model.stages(network)
