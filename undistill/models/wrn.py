"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016)."""

from pydantic import Field, field_validator
from torch import nn

from undistill.models.model import Model
from undistill.models.resnetc import preactivation
from undistill.models.trial import Shape


class WRN(Model):
    """`depth` = 6n + 4 layers: a stem of 16 channels, then three stages of 16, 32 and 64 times `width` channels."""

    depth: int = Field(16, ge=10, le=1000)
    width: int = Field(2, ge=1, le=1024)

    @field_validator("depth")
    @classmethod
    def _of_the_family(cls, depth: int) -> int:
        if depth % 6 != 4:
            raise ValueError("the depth must be 6n + 4: 10, 16, 22, 28, 34, 40, ...")
        return depth

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        return preactivation(shape[0], 16, 16 * self.width, self.depth // 6, num_classes)
