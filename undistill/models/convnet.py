"""A small convolutional network for small images of any size."""

from pydantic import Field
from torch import nn

from undistill.models.model import Model
from undistill.models.parts import staged
from undistill.models.trial import Shape


class ConvNet(Model):
    """Three 3x3 convolutions of `width`, 2 and 4 times `width` channels with batch norm, global average, linear."""

    width: int = Field(16, ge=1, le=1024)

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        channels, height, width = shape
        pool = nn.MaxPool2d(2) if min(height, width) >= 8 else nn.Identity()

        def block(inputs: int, outputs: int, *pooling: nn.Module) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), *pooling, nn.ReLU(inplace=True))

        network = nn.Sequential(
            block(channels, self.width),
            block(self.width, 2 * self.width, pool),
            block(2 * self.width, 4 * self.width, pool),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * self.width, num_classes),
        )
        return staged(network, range(3))
