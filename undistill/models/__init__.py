"""Networks. A classifier is an `nn.Module`: (B, C, H, W) in [0, 1] -> logits (B, K)."""

from undistill.core.seeds import seeded
from undistill.models.convnet import ConvNet
from undistill.models.factory import Factory
from undistill.models.given import Given
from undistill.models.mobilenetv2 import MobileNetV2
from undistill.models.model import (
    Model,
    features,
    frozen,
    last_features,
)
from undistill.models.plaincnn import PlainCNN
from undistill.models.resnet import ResNet
from undistill.models.resnetc import ResNetC
from undistill.models.resnext import ResNeXt
from undistill.models.shufflenetv2 import ShuffleNetV2
from undistill.models.timm import Timm
from undistill.models.trial import device_of, returned
from undistill.models.vgg import VGG
from undistill.models.weights import largest_weights, load_weights
from undistill.models.wrn import WRN

__all__ = [
    "VGG",
    "WRN",
    "ConvNet",
    "Factory",
    "Given",
    "MobileNetV2",
    "Model",
    "PlainCNN",
    "ResNeXt",
    "ResNet",
    "ResNetC",
    "ShuffleNetV2",
    "Timm",
    "device_of",
    "features",
    "frozen",
    "largest_weights",
    "last_features",
    "load_weights",
    "returned",
    "seeded",
]
