"""Networks. A classifier is an `nn.Module`: (B, C, H, W) in [0, 1] -> logits (B, K)."""

from undistill.models.convnet import ConvNet
from undistill.models.factory import Factory
from undistill.models.model import Model, device_of, features, frozen, load_weights, returned, seeded
from undistill.models.plaincnn import PlainCNN
from undistill.models.resnet import ResNet
from undistill.models.resnetc import ResNetC

__all__ = [
    "ConvNet",
    "Factory",
    "Model",
    "PlainCNN",
    "ResNet",
    "ResNetC",
    "device_of",
    "features",
    "frozen",
    "load_weights",
    "returned",
    "seeded",
]
