"""VGG-11 with batch norm (Simonyan and Zisserman 2015) and one linear layer, as it is used for small images."""

from pydantic import Field
from torch import nn

from undistill.models.model import Model
from undistill.models.parts import conv_norm, he_normal, staged
from undistill.models.trial import Shape

LAYERS = ((1,), (2,), (4, 4), (8, 8), (8, 8))  # times the width


class VGG(Model):
    """Eight convolutions in five stages, each followed by max-pooling, then a linear layer."""

    width: int = Field(64, ge=1, le=1024)
    """Channels of the first convolution."""

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        inputs, side = shape[0], min(shape[1:])
        layers: list[nn.Module] = []
        ends = []
        for stage in LAYERS:
            for times in stage:
                outputs = times * self.width
                layers += [*conv_norm(inputs, outputs, 3), nn.ReLU()]
                inputs = outputs
            if side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            ends.append(len(layers) - 1)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
        return he_normal(staged(nn.Sequential(*layers, *head), ends))
