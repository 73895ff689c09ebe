"""MNIST, Fashion-MNIST and KMNIST, from IDX files."""

import gzip
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from undistill.core.errors import DataError
from undistill.core.files import open_regular
from undistill.data.official import AGAIN, File, Official, reading
from undistill.data.split import Samples

LARGEST = 16 + 60_000 * 28 * 28  # bytes; a small archive may hold far more than fits into memory


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, gzipped or not; `DataError` if it is not a whole one."""
    with reading(path):
        with open_regular(path, LARGEST) as file, gzip.open(file) if path.suffix == ".gz" else file as unpacked:
            content = unpacked.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it holds more than {LARGEST:,} bytes")
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        if zeros or kind != 8:
            raise ValueError("no IDX file of unsigned bytes")
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if values.size != math.prod(shape):
            raise ValueError(f"it announces {shape} and holds {values.size} bytes")
        return values.reshape(shape)


class Idx(Official):
    """Grey images, 28 x 28."""

    listed = False
    counts = ((6_000,) * 10, (1_000,) * 10)
    names: ClassVar[Sequence[str]] = [str(digit) for digit in range(10)]

    def read_from(self, folder: Path) -> tuple[Samples, Samples, list[str]]:
        self._refuse_namesakes(folder)
        arrays = [read_idx(self.path(folder, file)) for file in self.files]
        return self._samples(*arrays[:2]), self._samples(*arrays[2:]), list(self.names)

    def path(self, folder: Path, file: File) -> Path:
        """Many tools leave the files unpacked."""
        packed = super().path(folder, file)
        return packed if packed.exists() or not packed.with_suffix("").exists() else packed.with_suffix("")

    def _refuse_namesakes(self, folder: Path) -> None:
        """All these data sets have files of the same names, and arrays of the same shapes."""
        for other in set(Idx.__subclasses__()) - {type(self)}:
            for file in other.files:
                if other().compare(folder, file):
                    raise DataError(
                        f"{folder / file.name} is a file of {other.__name__}, not of {type(self).__name__}. "
                        f"It is not used. {AGAIN.format('it')}"
                    )

    def _samples(self, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Samples:
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(f"images of shape {images.shape} with labels of shape {labels.shape}")
        return Samples(torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64)))


def _four(*md5: str) -> tuple[File, ...]:
    names = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    return tuple(File(f"{name}-ubyte.gz", published) for name, published in zip(names, md5, strict=True))


class MNIST(Idx):
    """70,000 handwritten digits, 28 x 28 (LeCun, Cortes and Burges 1998)."""

    home = "https://ossci-datasets.s3.amazonaws.com/mnist"
    folders = ("mnist", "MNIST/raw")
    files = _four(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    )
    counts = (
        (5_923, 6_742, 5_958, 6_131, 5_842, 5_421, 5_918, 6_265, 5_851, 5_949),
        (980, 1_135, 1_032, 1_010, 982, 892, 958, 1_028, 974, 1_009),
    )


class FashionMNIST(Idx):
    """70,000 pieces of clothing, 28 x 28 (Xiao, Rasul and Vollgraf 2017)."""

    home = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    folders = ("fashion-mnist", "FashionMNIST/raw")
    files = _four(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    )
    names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class KMNIST(Idx):
    """70,000 cursive Japanese characters, 28 x 28 (Clanuwat et al. 2018)."""

    home = "http://codh.rois.ac.jp/kmnist/dataset/kmnist"
    folders = ("kmnist", "KMNIST/raw")
    files = _four(
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    )
    names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
