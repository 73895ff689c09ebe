"""Aggregated residual networks for small images (Xie et al., CVPR 2017)."""

from pydantic import Field, field_validator
from torch import nn

from undistill.models.model import Model
from undistill.models.parts import conv_norm, he_normal, staged
from undistill.models.resnet import Residual
from undistill.models.trial import Shape


class ResNeXt(Model):
    """`depth` = 9n + 2 layers, `cardinality` groups of `width` channels; ResNeXt-29 (8 x 64) by default."""

    depth: int = Field(29, ge=11, le=1000)
    cardinality: int = Field(8, ge=1, le=1024)
    width: int = Field(64, ge=1, le=1024)

    @field_validator("depth")
    @classmethod
    def _of_the_family(cls, depth: int) -> int:
        if depth % 9 != 2:
            raise ValueError("the depth must be 9n + 2: 11, 20, 29, 38, ...")
        return depth

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        layers: list[nn.Module] = [*conv_norm(shape[0], 64, 3), nn.ReLU()]
        inputs, ends = 64, []
        for stage in range(3):
            for number in range(self.depth // 9):
                outputs, stride = 256 * 2**stage, 2 if stage > 0 and number == 0 else 1
                layers.append(Aggregated(inputs, outputs, self.width * 2**stage, self.cardinality, stride))
                inputs = outputs
            ends.append(len(layers) - 1)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
        return he_normal(staged(nn.Sequential(*layers, *head), ends))


class Aggregated(Residual):
    """Reduce, a grouped 3 x 3 convolution, expand."""

    def __init__(self, inputs: int, outputs: int, width: int, groups: int, stride: int) -> None:
        inner = width * groups
        reduce, expand = conv_norm(inputs, inner, 1), conv_norm(inner, outputs, 1)
        convolve = conv_norm(inner, inner, 3, stride, groups)
        super().__init__(inputs, outputs, stride, *reduce, nn.ReLU(), *convolve, nn.ReLU(), *expand)
