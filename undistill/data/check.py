"""A data set, checked file by file and class by class."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from undistill.data.official import File, Official
from undistill.data.sheet import COLUMNS
from undistill.data.source import Source
from undistill.data.split import Data

SHOWN = 128  # pixels of the longer side
OTHER = "other bytes than published, but complete and well-formed"


@dataclass(frozen=True)
class Check:
    """`files`: what was found of each published file."""

    folder: Path | None
    files: dict[str, str]
    data: Data

    @property
    def as_published(self) -> bool:
        """Whether every file with a published hash has it."""
        return OTHER not in self.files.values()

    @property
    def counts(self) -> dict[str, Tensor]:
        """Images of every class (K,), by part."""
        parts = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        return {name: torch.bincount(part.labels, minlength=self.data.num_classes) for name, part in parts.items()}

    def sheet(self, rows: int = 10) -> Tensor:
        """uint8 (N, C, H, W): `COLUMNS` training images of each of the first `rows` classes, white if it has fewer.

        Of large images, every n-th pixel is shown.
        """
        labels, (channels, height, width) = self.data.train.labels, self.data.shape
        step = math.ceil(max(height, width) / SHOWN)
        small = (channels, math.ceil(height / step), math.ceil(width / step))
        found = [(labels == label).nonzero().flatten()[:COLUMNS] for label in range(min(rows, self.data.num_classes))]
        whole = torch.full((len(found) * COLUMNS, *small), 255, dtype=torch.uint8)
        for row, index in zip(whole.split(COLUMNS), found, strict=True):
            for place, one in zip(row, index, strict=False):
                place.copy_(self.data.train[one[None]].pixels[0, :, ::step, ::step])
        return whole


def check(source: Source) -> Check:
    """Read everything, and compare files with their published MD5; `DataError` if it cannot be used."""
    data = source.load()
    if not isinstance(source, Official):
        return Check(None, {}, data)
    folder = source.find()
    return Check(folder, {source.path(folder, file).name: _state(source, folder, file) for file in source.files}, data)


def _state(source: Official, folder: Path, file: File) -> str:
    published = source.compare(folder, file)
    if published is None:
        return "read whole and counted; only the archive it came in has a published hash"
    return "as published" if published else OTHER
