"""ShuffleNetV2 (Ma et al., ECCV 2018)."""

import torch
from torch import Tensor, nn

from undistill.models.model import Model
from undistill.models.parts import conv_norm, he_normal, is_small, staged
from undistill.models.trial import Shape

STAGES = ((116, 4), (232, 8), (464, 4))  # channels, units (table 5, 1x)


class ShuffleNetV2(Model):
    """Width 1x; for images up to 64 pixels the stem keeps the resolution and does not pool."""

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        small = is_small(shape)
        layers: list[nn.Module] = [*conv_norm(shape[0], 24, 3, 1 if small else 2), nn.ReLU()]
        layers += [] if small else [nn.MaxPool2d(3, 2, 1)]
        inputs, ends = 24, []
        for outputs, units in STAGES:
            layers += [Downsampling(inputs, outputs), *(Unit(outputs) for _ in range(units - 1))]
            inputs = outputs
            ends.append(len(layers) - 1)
        layers += [*conv_norm(inputs, 1024, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return he_normal(staged(nn.Sequential(*layers, nn.Linear(1024, num_classes)), ends))


def branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first, last = conv_norm(inputs, outputs, 1), conv_norm(outputs, outputs, 1)
    return nn.Sequential(*first, nn.ReLU(), *conv_norm(outputs, outputs, 3, stride, outputs), *last, nn.ReLU())


class Unit(nn.Module):
    """One half of the channels goes through the branch, the other passes; then both are shuffled (figure 3c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = branch(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return shuffle(kept, self.branch(changed))


class Downsampling(nn.Module):
    """Both branches see all channels and halve the resolution (figure 3d)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.shortcut = nn.Sequential(*conv_norm(inputs, inputs, 3, 2, inputs), *conv_norm(inputs, half, 1), nn.ReLU())
        self.branch = branch(inputs, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(self.shortcut(x), self.branch(x))


def shuffle(a: Tensor, b: Tensor) -> Tensor:
    """Channels of (B, C, H, W) `a` and `b` in turn, (B, 2C, H, W)."""
    return torch.stack([a, b], 2).flatten(1, 2)
