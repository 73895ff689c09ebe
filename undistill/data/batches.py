"""The views that one training shows, in any order and as often as they are asked for."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from undistill.data.files import fetched
from undistill.data.split import Samples
from undistill.data.views import Views


@dataclass(frozen=True, eq=False)
class ViewDataset:
    """`views` of `samples`, drawn with `seed`."""

    samples: Samples
    views: Views
    seed: int
    num_classes: int

    def show(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 views (B, C, H, W) of the samples `index` (B,) in `epoch`, and their labels, see `Views`."""
        return self.views(self.samples, self.seed, epoch, index, self.num_classes)

    def shows(self, epoch: int, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`show` of each part in turn; samples that do not lie in memory are read ahead by worker processes."""
        return fetched(self.samples.images, _Shower(self, epoch), parts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything on which a view depends, but for the epoch."""
        return hashlib.sha256(repr((self.samples.digest, str(self.views), self.seed)).encode()).hexdigest()


@dataclass(frozen=True)
class _Shower:
    stream: ViewDataset
    epoch: int

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.stream.show(self.epoch, index)


@dataclass(frozen=True, eq=False)
class ViewRef:
    """Which views `images` are, for as long as nobody changes them."""

    stream: ViewDataset
    epoch: int
    index: Tensor
    images: Tensor
    version: int


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
    def of(cls, stream: ViewDataset, epoch: int, index: Tensor, images: Tensor, labels: Tensor) -> "Batch":
        """A batch that remembers which views it shows; `images` are theirs in [0, 1]."""
        return cls(images, labels, index, epoch, ViewRef(stream, epoch, index, images, images._version))

    @property
    def shown(self) -> ViewRef | None:
        """Which views the images are; None once they have been replaced or changed."""
        untouched = self.origin and self.origin.images is self.images and self.origin.version == self.images._version
        return self.origin if untouched else None
