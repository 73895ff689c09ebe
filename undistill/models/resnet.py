"""Residual networks (He et al., CVPR 2016), with the stem that small images need."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from undistill.models.model import Model
from undistill.models.parts import conv_norm, he_normal, is_small, staged
from undistill.models.trial import Shape

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResNet(Model):
    """ResNet-18, 34 or 50; a 3 x 3 stem without pooling for images up to 64 pixels, 7 x 7 above."""

    depth: Literal[18, 34, 50] = 18
    width: int = Field(64, ge=1, le=1024)
    """Channels of the first stage."""

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        channels = shape[0]
        block = Bottleneck if self.depth == 50 else BasicBlock
        small = is_small(shape)
        layers: list[nn.Module] = [*conv_norm(channels, self.width, 3 if small else 7, 1 if small else 2), nn.ReLU()]
        layers += [] if small else [nn.MaxPool2d(3, 2, 1)]
        inputs, ends = self.width, []
        for stage, count in enumerate(LAYERS[self.depth]):
            width = self.width * 2**stage
            for number in range(count):
                layers.append(block(inputs, width, stride=2 if stage > 0 and number == 0 else 1))
                inputs = width * block.expansion
            ends.append(len(layers) - 1)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
        return he_normal(staged(nn.Sequential(*layers, *head), ends))


class Residual(nn.Module):
    """`body` added to the input (projected where the shape changes), then ReLU."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class BasicBlock(Residual):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        first, second = conv_norm(inputs, width, 3, stride), conv_norm(width, width, 3)
        super().__init__(inputs, width, stride, *first, nn.ReLU(), *second)


class Bottleneck(Residual):
    """The stride is that of the 3 x 3 convolution (ResNet v1.5)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        reduce, convolve = conv_norm(inputs, width, 1), conv_norm(width, width, 3, stride)
        expand = conv_norm(width, 4 * width, 1)
        super().__init__(inputs, 4 * width, stride, *reduce, nn.ReLU(), *convolve, nn.ReLU(), *expand)
