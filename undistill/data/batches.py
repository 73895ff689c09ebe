"""The views that one training shows, in any order and as often as they are asked for."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from undistill.core.files import MIB
from undistill.data.files import fetched
from undistill.data.split import Samples
from undistill.data.views import Mixture, Views, mixed_labels, to_float

SHARE = 1 / 16
"""Largest share of a GPU's free memory for views that are made at once."""
HELD = 32 * MIB
"""The same on a CPU, in bytes: more is out of its caches, and slower again."""
GRIDS = 6  # grids of coordinates that are there at the same time


@dataclass(frozen=True, eq=False)
class ViewDataset:
    """Views of `samples`, drawn with `seed`: the dataset that one training shows, epoch by epoch."""

    samples: Samples
    views: Views
    seed: int
    num_classes: int

    def show(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 views (B, C, H, W) of the samples `index` (B,) in `epoch`, and their labels, see `Views`."""
        return self.views(self.samples, self.seed, epoch, index, self.num_classes)

    def labels(self, epoch: int, index: Tensor) -> Tensor:
        """The labels that `show` gives, without the views."""
        mixture = self.views.mixture(self.samples, self.seed, epoch, index)
        return mixed_labels(self.samples, index, mixture, self.num_classes)

    def shows(self, epoch: int, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`show` of each part in turn, made for many parts at once, since the work of one is mostly overhead.

        Samples that do not lie in memory are read ahead by threads.
        """
        images = self.samples.images
        if not isinstance(images, Tensor):
            yield from fetched(images, partial(self.show, epoch), parts)
            return
        for group in grouped(parts, at_once(images)):
            views, labels = self.show(epoch, torch.cat(group))
            sizes = list(map(len, group))
            yield from zip(views.split(sizes), labels.split(sizes), strict=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything on which a view depends, but for the epoch."""
        return hashlib.sha256(repr((self.samples.image_digest, str(self.views), self.seed)).encode()).hexdigest()


def at_once(images: Tensor) -> int:
    """How many views of such images are made together, within a stated share of the memory of their device."""
    channels, height, width = images.shape[1:]
    each = height * width * (GRIDS * 8 + 3 * channels)  # coordinates are whole numbers of 64 bits
    room = SHARE * torch.cuda.mem_get_info(images.device)[0] if images.is_cuda else HELD
    return max(int(room) // each, 1)


def grouped(parts: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Consecutive parts that have at most so many indices together; one that has more is alone."""
    group: list[Tensor] = []
    for part in parts:
        if group and sum(map(len, group)) + len(part) > most:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


@dataclass(frozen=True, eq=False)
class ViewRef:
    """Identity of an unmodified batch: which dataset, epoch and indices it shows."""

    dataset: ViewDataset
    epoch: int
    index: Tensor
    images: Tensor
    version: int
    """How often the images had been changed in place."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of views: images (B, C, H, W) in [0, 1], labels (B,), and which view of which sample each is.

    Where views are mixed (`Views.mixup`, `Views.cutmix`), labels are shares (B, K).
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    epoch: int
    origin: ViewRef | None = None

    @classmethod
    def of(cls, dataset: ViewDataset, epoch: int, index: Tensor, images: Tensor, labels: Tensor) -> "Batch":
        """A batch that remembers which views it shows; `images` are theirs in [0, 1]."""
        return cls(images, labels, index, epoch, ViewRef(dataset, epoch, index, images, images._version))

    @property
    def mixture(self) -> Mixture | None:
        """How its views are mixed with those of other samples; None unless they are."""
        if self.origin is None:
            return None
        dataset = self.origin.dataset
        return dataset.views.mixture(dataset.samples, dataset.seed, self.epoch, self.index)

    def seen_as(self, dataset: ViewDataset) -> Tensor:
        """Other views (B, C, H, W) in [0, 1] of the same images: those that `dataset` shows in this epoch."""
        return to_float(dataset.show(self.epoch, self.index)[0].to(self.images.device))

    @property
    def shown(self) -> ViewRef | None:
        """Identity of the images; None once they have been replaced or changed."""
        untouched = self.origin and self.origin.images is self.images and self.origin.version == self.images._version
        return self.origin if untouched else None
