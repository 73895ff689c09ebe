"""Samples, and how they are divided. What trains never holds test data: its type has no such field."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from undistill.core.errors import DataError, legible, remark
from undistill.data.files import ImageFiles

LONGEST = 200  # characters of a class name
NO_LABEL = -100  # torch ignores it in losses, which are NaN where nothing else is left


@dataclass(frozen=True)
class Samples:
    """images: (N, C, H, W) uint8, in memory or in files; labels: (N,) int64."""

    images: Tensor | ImageFiles
    labels: Tensor
    same: "Samples | None" = field(default=None, repr=False, compare=False)
    """The labelled samples of which these are the images alone; they are held and hashed once for both."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Samples":
        images = self.images[index] if isinstance(self.images, Tensor) else self.images.subset(index)
        return Samples(images, self.labels[index])

    def parts(self, size: int) -> Sequence[Tensor]:
        """All indices in order, in parts of `size`, the last one smaller."""
        parts: Sequence[Tensor] = torch.arange(len(self), device=self.labels.device).split(size)
        return parts

    @property
    def pixels(self) -> Tensor:
        """All images in memory, (N, C, H, W) uint8."""
        return self.images if isinstance(self.images, Tensor) else self.images[torch.arange(len(self))]

    def hashes(self, *, of_pixels: bool = False) -> list[bytes]:
        """SHA-256 of each image: of its pixels, or, unless `of_pixels`, of its file where it stays in one."""
        if isinstance(self.images, Tensor):
            return [hashlib.sha256(image.tobytes()).digest() for image in self.images.cpu().numpy()]
        if of_pixels:
            return [
                image for part in self.parts(512) for image in Samples(self[part].pixels, self.labels[part]).hashes()
            ]
        return self.images.hashes()

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of every image and label, in order."""
        images = self.images.cpu().numpy().tobytes() if isinstance(self.images, Tensor) else self.images.digest()
        return hashlib.sha256(images + self.labels.cpu().numpy().tobytes()).digest()

    @cached_property
    def image_digest(self) -> bytes:
        """SHA-256 of every image, in order."""
        if self.same is not None:
            return self.same.image_digest
        images = self.images.cpu().numpy().tobytes() if isinstance(self.images, Tensor) else self.images.digest()
        return hashlib.sha256(images).digest()

    @property
    def unlabelled(self) -> "Samples":
        """The same images without their labels: `NO_LABEL` stands for each."""
        return Samples(self.images, torch.full_like(self.labels, NO_LABEL), self)

    def to(self, device: torch.device) -> "Samples":
        """On the device, one copy for all who ask; images that lie in files stay there, and so do their labels."""
        if self.labels.device == device or not isinstance(self.images, Tensor):
            return self
        if self.same is not None:
            return self.same.to(device).unlabelled
        if device not in self._copies:
            copy = Samples(self.images.to(device), self.labels.to(device))
            vars(copy)["image_digest"] = self.image_digest
            self._copies[device] = copy
        return self._copies[device]

    @cached_property
    def _copies(self) -> "dict[torch.device, Samples]":
        return {}

    def carve(self, share: float | int, seed: int) -> tuple["Samples", "Samples"]:
        """(rest, carved): a stratified random `share` (or whole number) of the samples, chosen by `seed`."""
        from sklearn.model_selection import train_test_split  # here, since every start would wait a second for it

        index = np.arange(len(self))
        try:
            rest, carved = train_test_split(index, test_size=share, random_state=seed, stratify=self.labels.numpy())
        except ValueError as error:
            part = f"{share:.0%}" if share < 1 else str(share)
            raise DataError(
                f"Cannot carve a stratified {part} out of {len(self)} images: {error} "
                "Add images of the rarest class, or ask for a larger share."
            ) from None
        return self[torch.from_numpy(np.sort(rest))], self[torch.from_numpy(np.sort(carved))]


def joined(parts: Sequence[Samples]) -> Samples:
    """All images of several parts, in order."""
    labels = torch.cat([part.labels for part in parts])
    files = [part.images for part in parts if isinstance(part.images, ImageFiles)]
    if len(files) == len(parts):
        return Samples(ImageFiles.join(files), labels)
    if files:
        raise DataError("Parts that stay in their files cannot be joined with others; name the folder of one of them.")
    return Samples(torch.cat([part.pixels for part in parts]), labels)


@dataclass(frozen=True)
class Split:
    """Training images, and the validation images on which choices are made."""

    classes: tuple[str, ...]
    train: Samples
    validation: Samples
    spare: Samples | None = field(default=None, kw_only=True)
    """Images of a thief, without labels, beyond those for which his budget buys answers."""

    @property
    def everything(self) -> Samples:
        """Training images and spare ones, without labels."""
        parts = [part.unlabelled for part in (self.train, self.spare) if part is not None]
        return parts[0] if len(parts) == 1 else joined(parts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def is_labelled(self) -> bool:
        """Whether whoever trains on it may see its labels."""
        return bool((self.train.labels != NO_LABEL).all())

    @property
    def unlabelled(self) -> "Split":
        """The same without labels of training images. Validation labels stay for measuring; nothing is chosen by them.

        `Fit` keeps the last epoch of a training on unlabelled images, whatever its recipe says.
        """
        return replace(self, train=self.train.unlabelled)

    def some(self, count: int, seed: int) -> "Split":
        """`count` training images, chosen by `seed` whatever their classes, or all there are; the others are spare."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator)
        index, rest = order[:count].sort().values, order[count:].sort().values
        return replace(self, train=self.train[index], spare=self.train[rest].unlabelled if len(rest) else None)


@dataclass(frozen=True)
class Data(Split):
    """The owner's data. `test` is for the final measurement alone."""

    test: Samples

    @property
    def digest(self) -> str:
        """SHA-256 of every image and label, in order."""
        sha = hashlib.sha256(repr((self.classes, self.shape)).encode())
        for part in (self.train, self.validation, self.test):
            sha.update(part.digest)
        return sha.hexdigest()

    @property
    def split(self) -> Split:
        """Training and validation images without the test images, for training and defences."""
        return Split(self.classes, self.train, self.validation)

    def attackers(self, validation: float, seed: int, share: float = 1.0) -> Split:
        """Data of an attacker with a `share` of the owner's training images, divided into training and validation."""
        pool = self.train if share == 1 else self.train.carve(share, seed)[1]
        return Split(self.classes, *pool.carve(validation, seed))


@dataclass(frozen=True)
class Parts:
    """The images that a source holds. `validation` and `test` are None unless it brings its own."""

    train: Samples
    classes: Sequence[str]
    validation: Samples | None = None
    test: Samples | None = None


def divide(parts: Parts, *, test_share: float, validation_share: float, count: int | None, seed: int) -> Data:
    """Carve what the source does not bring, test and validation images, out of its training images; keep `count`.

    By seed, and stratified.
    """
    classes = [legible(str(name))[:LONGEST] for name in parts.classes]
    pool, validation, test = parts.train, parts.validation, parts.test
    if len(classes) < 2:
        raise DataError(f"A classifier needs at least two classes; found {len(classes)}: {list(classes)}.")
    if absent := _absent(pool, classes):
        raise DataError(f"No image of class {classes[absent[0]]} (label {absent[0]}); every class needs some.")
    for name, own in (("validation", validation), ("test", test)):
        if own is not None and (absent := _absent(own, classes)):
            remark(f"No {name} image of {_listed([classes[label] for label in absent])}: nothing is measured on it.")
    if test is None:
        pool, test = _carve(pool, test_share, seed, "test", classes)
    if count is not None and count < len(pool):
        if not len(classes) <= count <= len(pool) - len(classes):
            raise DataError(
                f"count={count} keeps {count} of {len(pool)} images and leaves out {len(pool) - count}, and there are "
                f"{len(classes)} classes, each of which must be among both. Leave count out to take all, or ask for "
                f"{len(classes)} to {len(pool) - len(classes)}."
            )
        _, pool = pool.carve(count, seed)
    if validation is None:
        pool, validation = _carve(pool, validation_share, seed, "validation", classes)
    return Data(tuple(classes), pool, validation, test)


def _absent(samples: Samples, classes: Sequence[str]) -> list[int]:
    """Labels of which there is no image; `DataError` for labels that are none."""
    require_labels(samples, classes)
    return (torch.bincount(samples.labels, minlength=len(classes)) == 0).nonzero().flatten().tolist()


def require_labels(samples: Samples, classes: Sequence[str]) -> None:
    """Raise `DataError` for labels beyond the classes."""
    low, high = int(samples.labels.min()), int(samples.labels.max())
    if low < 0 or high >= len(classes):
        raise DataError(
            f"Labels run from {low} to {high}; with {len(classes)} classes they must lie in 0 to {len(classes) - 1}."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more classes" if names[10:] else "")


def _carve(pool: Samples, share: float, seed: int, setting: str, classes: Sequence[str]) -> tuple[Samples, Samples]:
    """(rest, carved), see `Samples.carve`; the `DataError` names the class, the setting and a value that works."""
    counts = torch.bincount(pool.labels, minlength=len(classes))
    rarest, total, least = int(counts.argmin()), len(pool), len(classes)
    if counts[rarest] < 2:
        raise DataError(
            f"Class {classes[rarest]} has a single image from which {setting} images could be taken. Every class needs "
            f"two; add images of it, leave it out, or bring {setting} images of your own."
        )
    if least <= math.ceil(share * total) <= total - least:
        return pool.carve(share, seed)
    works = [
        value for value in (math.ceil(100 * least / total) / 100, 0.5) if math.ceil(value * total) <= total - least
    ]
    advice = f"ask for {setting}={works[0]:g}, or add images" if works else f"at least {2 * least} images are needed"
    raise DataError(
        f"{setting}={share:g} takes {math.ceil(share * total)} of {total} images, and each of {least} classes must be "
        f"among those that are taken and among the rest; {advice}. The rarest class is {classes[rarest]}, with "
        f"{int(counts[rarest])} images."
    )
