"""VGG-11 with batch norm (Simonyan and Zisserman 2015) and one linear layer, as it is used for small images."""

from torch import nn

from undistill.models.model import Model, Shape
from undistill.models.parts import conv_norm, he_normal

LAYERS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG(Model):
    """Eight convolutions in five stages, each followed by max-pooling, then a linear layer."""

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        inputs, side = shape[0], min(shape[1:])
        layers: list[nn.Module] = []
        for stage in LAYERS:
            for outputs in stage:
                layers += [*conv_norm(inputs, outputs, 3), nn.ReLU()]
                inputs = outputs
            if side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        return he_normal(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)))
