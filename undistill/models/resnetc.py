"""Pre-activation residual networks for small images (He et al., ECCV 2016)."""

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from undistill.models.model import Model
from undistill.models.parts import he_normal, staged
from undistill.models.trial import Shape


class ResNetC(Model):
    """`depth` = 6n + 2 layers in three stages of `width`, 2 and 4 times `width` channels."""

    depth: int = Field(8, ge=8, le=1000)
    width: int = Field(16, ge=1, le=1024)

    @field_validator("depth")
    @classmethod
    def _of_the_family(cls, depth: int) -> int:
        if depth % 6 != 2:
            raise ValueError("the depth must be 6n + 2: 8, 14, 20, 26, 32, ...")
        return depth

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        return preactivation(shape[0], self.width, self.width, self.depth // 6, num_classes)


def preactivation(channels: int, stem: int, width: int, blocks: int, num_classes: int) -> nn.Module:
    """A 3 x 3 stem, then three stages of `blocks` blocks with `width`, 2 and 4 times `width` channels."""
    inputs, ends = stem, []
    layers: list[nn.Module] = [nn.Conv2d(channels, inputs, 3, padding=1, bias=False)]
    for stage in range(3):
        for block in range(blocks):
            outputs = width * 2**stage
            layers.append(Block(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
            inputs = outputs
        ends.append(len(layers) - 1)
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
    return he_normal(staged(nn.Sequential(*layers, *head), ends))


class Block(nn.Module):
    """BN, ReLU, conv, BN, ReLU, conv, added to the input (projected where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.project = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut: Tensor = x if self.project is None else self.project(active)
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return shortcut + residual
