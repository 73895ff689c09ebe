"""Images as uint8 tensors, and the sources they come from (one file each)."""

from undistill.data.apart import Apart
from undistill.data.cifar import CIFAR10, CIFAR100
from undistill.data.digits import Digits
from undistill.data.files import ImageFiles, fetched
from undistill.data.folder import Folder
from undistill.data.idx import KMNIST, MNIST, FashionMNIST
from undistill.data.leaky import Leaky
from undistill.data.npz import Npz
from undistill.data.official import Official
from undistill.data.source import Source
from undistill.data.split import Data, Samples, Split
from undistill.data.svhn import SVHN
from undistill.data.tiny_imagenet import TinyImageNet

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "KMNIST",
    "MNIST",
    "SVHN",
    "Apart",
    "Data",
    "Digits",
    "FashionMNIST",
    "Folder",
    "ImageFiles",
    "Leaky",
    "Npz",
    "Official",
    "Samples",
    "Source",
    "Split",
    "TinyImageNet",
    "fetched",
]
