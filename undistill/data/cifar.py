"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the pickled batches of their author."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from undistill.data.official import File, Official, reading
from undistill.data.split import Samples
from undistill.data.unpickle import read_batch


class Cifar(Official):
    """Colour photographs, 32 x 32."""

    home = "https://www.cs.toronto.edu/~kriz"
    listed = False
    label: ClassVar[str]
    """The field of a batch that holds the labels."""
    names: ClassVar[str]
    """The field of the last file, that holds the class names."""

    def read_from(self, folder: Path) -> tuple[Samples, Samples, list[str]]:
        *train, test, meta = (folder / file.name for file in self.files)
        with reading(meta, self._again):
            classes = _names(read_batch(meta)[self.names])
        return self._samples(train), self._samples([test]), classes

    def _samples(self, files: Sequence[Path]) -> Samples:
        rows, labels = zip(*map(self._batch, files), strict=True)
        pixels = torch.from_numpy(np.concatenate(rows)).view(-1, 3, 32, 32)
        return Samples(pixels, torch.from_numpy(np.concatenate(labels)))

    def _batch(self, file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Pixels (N, 3072) and labels (N,)."""
        with reading(file, self._again):
            batch = read_batch(file)
            rows, labels = batch["data"], _whole_numbers(batch[self.label])
            if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape != (len(labels), 3072):
                raise ValueError(f"{len(labels)} labels, and images that are not as many rows of 3072 bytes")
            return rows, labels


def _whole_numbers(values: Any) -> NDArray[np.int64]:
    """`ValueError` for anything else: lists in lists may be more than fits into memory, each named again and again."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return values.astype(np.int64)
    if isinstance(values, list | tuple) and all(type(value) is int for value in values):
        return np.array(values, np.int64)
    raise ValueError("labels that are no whole numbers")


def _names(values: Any) -> list[str]:
    """`ValueError` for anything else; a terminal or a figure is to print them."""
    if isinstance(values, list | tuple) and all(type(value) is str and value.isprintable() for value in values):
        return list(values)
    raise ValueError("class names that are no text")


class CIFAR10(Cifar):
    """60,000 colour photographs of 10 kinds of things, 32 x 32 (Krizhevsky 2009)."""

    folders = ("cifar-10-batches-py",)
    archive = File("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
    files = (
        File("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        File("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        File("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        File("data_batch_4", "634d18415352ddfa80567beed471001a"),
        File("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        File("test_batch", "40351d587109b95175f43aff81a1287e"),
        File("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    )
    counts = ((5_000,) * 10, (1_000,) * 10)
    label = "labels"
    names = "label_names"


class CIFAR100(Cifar):
    """60,000 colour photographs of 100 kinds of things, 32 x 32 (Krizhevsky 2009)."""

    folders = ("cifar-100-python",)
    archive = File("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
    files = (
        File("train", "16019d7e3df5f24257cddd939b257f8d"),
        File("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        File("meta", "7973b15100ade9c7d40fb424638fde48"),
    )
    counts = ((500,) * 100, (100,) * 100)
    label = "fine_labels"
    names = "fine_label_names"
