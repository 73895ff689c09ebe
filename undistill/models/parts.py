"""Parts that several networks share."""

from collections.abc import Sequence

from torch import nn

from undistill.models.trial import Shape

SMALL = 64  # pixels of the shorter side, up to which a network keeps the resolution at first


def is_small(shape: Shape) -> bool:
    """Whether images of `shape` are those of CIFAR or Tiny-ImageNet rather than ImageNet."""
    return min(shape[1:]) <= SMALL


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def staged(network: nn.Sequential, ends: Sequence[int]) -> nn.Module:
    """`network`, which names the layers at which its stages end; see `Model.stages`."""
    network.stages = [str(end) for end in ends]  # type: ignore[assignment]
    return network


def he_normal(network: nn.Module) -> nn.Module:
    """Convolutions initialised for ReLU by their fan-out (He et al., ICCV 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
