"""The paper's plain CNN student."""

from pydantic import Field
from torch import nn

from undistill.core.errors import ModelError
from undistill.models.model import Model
from undistill.models.parts import staged
from undistill.models.trial import Shape


class PlainCNN(Model):
    """3 x [conv3x3, BN, max-pool, ReLU] of 32, 64, 128 channels, fc 128, BN, ReLU, fc K (Ma et al. 2021)."""

    width: int = Field(32, ge=1, le=1024)

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        channels, height, width = shape
        if min(height, width) < 8:
            raise ModelError(f"PlainCNN halves the image three times and needs 8 x 8 pixels; got {height} x {width}.")
        layers: list[nn.Module] = []
        for outputs in (self.width, 2 * self.width, 4 * self.width):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU()]
            channels = outputs
        hidden = 4 * self.width
        flat = hidden * (height // 8) * (width // 8)
        network = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )
        return staged(network, (3, 7, 11))
