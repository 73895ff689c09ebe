"""MobileNetV2 (Sandler et al., CVPR 2018)."""

from torch import Tensor, nn

from undistill.models.model import Model, Shape
from undistill.models.parts import conv_norm, he_normal, is_small

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
    """Width 1; for images up to 64 pixels the stem and the first wide stage keep the resolution."""

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        small = is_small(shape)
        layers: list[nn.Module] = [*conv_norm(shape[0], 32, 3, 1 if small else 2), nn.ReLU6()]
        inputs = 32
        for expansion, outputs, blocks, stride in STAGES:
            for number in range(blocks):
                first = number == 0 and not (small and outputs == 24)
                layers.append(InvertedResidual(inputs, outputs, expansion, stride if first else 1))
                inputs = outputs
        layers += [*conv_norm(inputs, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return he_normal(nn.Sequential(*layers, nn.Linear(1280, num_classes)))


class InvertedResidual(nn.Module):
    """Expand, a depthwise 3 x 3 convolution, a linear bottleneck; added to the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = [*conv_norm(inputs, inner, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*conv_norm(inner, inner, 3, stride, inner), nn.ReLU6()]
        self.body = nn.Sequential(*expand, *depthwise, *conv_norm(inner, outputs, 1))
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.added else out
