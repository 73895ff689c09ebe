"""MobileNetV2 (Sandler et al., CVPR 2018)."""

from pydantic import Field
from torch import Tensor, nn

from undistill.models.model import Model
from undistill.models.parts import conv_norm, he_normal, is_small, staged
from undistill.models.trial import Shape

# expansion, channels, blocks, stride (table 2)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(Model):
    """For images up to 64 pixels as in the code of "Undistillable": a 1 x 1 stem and the stage of 160 channels keep the
    resolution, and the first block has an expansion, by 1."""

    width: float = Field(1.0, gt=0, le=16)
    """Multiplies all channels, which stay multiples of 8; the last 1280 only above 1."""

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        small = is_small(shape)
        inputs, last = self._scaled(32), max(self._scaled(1280), 1280)
        kernel, stride = (1, 1) if small else (3, 2)
        layers: list[nn.Module] = [*conv_norm(shape[0], inputs, kernel, stride), nn.ReLU6()]
        ends = []
        for expansion, channels, blocks, stride in STAGES:
            outputs = self._scaled(channels)
            for number in range(blocks):
                first = number == 0 and not (small and channels == 160)
                expanded = small or expansion > 1
                layers.append(InvertedResidual(inputs, outputs, expansion, stride if first else 1, expanded))
                inputs = outputs
            ends.append(len(layers) - 1)
        layers += [*conv_norm(inputs, last, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return he_normal(staged(nn.Sequential(*layers, nn.Linear(last, num_classes)), ends))

    def _scaled(self, channels: int) -> int:
        return max(8, 8 * int(channels * self.width / 8 + 0.5))


class InvertedResidual(nn.Module):
    """Expand, a depthwise 3 x 3 convolution, a linear bottleneck; added to the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, expanded: bool) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = [*conv_norm(inputs, inner, 1), nn.ReLU6()] if expanded else []
        depthwise = [*conv_norm(inner, inner, 3, stride, inner), nn.ReLU6()]
        self.body = nn.Sequential(*expand, *depthwise, *conv_norm(inner, outputs, 1))
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.added else out
