"""`Source`: where images come from."""

import os
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field

from undistill.core.errors import DataError
from undistill.core.spec import Spec
from undistill.data.copies import without_copies
from undistill.data.pictures import PLAIN, Reading
from undistill.data.split import Data, Parts, divide

ResolvedPath = Annotated[str, AfterValidator(lambda text: os.path.realpath(os.path.expanduser(text)))]
"""A path that means the same from every working directory."""


class Source(Spec):
    """A data set: `digits`, `Folder(path='photos')`, or simply a path on the command line."""

    published: ClassVar[bool] = False
    """Whether others have measured on these images, so that none is left out, not even a copy of another."""

    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the training images kept for choices (model selection, omega, tuning), unless the source brings some."""
    test: float | None = Field(None, gt=0, lt=1)
    """Share of all images kept for the final measurement, where the source brings no test images (0.2)."""
    count: int | None = Field(None, ge=2)
    """How many of the training images are used, the classes in their proportions; None uses all."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the division into parts."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a spec; a bare path becomes the source that reads it."""
        known = text.casefold() in {name.casefold() for name in cls.registry}
        path = Path(os.path.expanduser(text))
        exists = os.path.exists(path)  # unlike Path.exists, False for a text that can be no path
        if known or not (exists or ("(" not in text and ("/" in text or path.suffix))):
            return super().parse(text)
        if not exists:
            raise DataError(f"There is no file or folder {text}.")
        reader = cls.registry["Folder" if path.is_dir() else "Npz"]
        source: Self = reader(path=text)
        return source

    @property
    def title(self) -> str:
        """Name for readers."""
        return type(self).__name__.lower()

    @property
    def reading(self) -> Reading:
        """How pictures are brought to the shape of its images."""
        return PLAIN

    @abstractmethod
    def read(self) -> Parts:
        """Everything that the source holds."""

    def load(self) -> Data:
        """The data, divided by `seed`. `DataError` says what cannot be used and why."""
        parts = self.read() if self.published else without_copies(self.read(), self.title)
        for name, own in (("validation", parts.validation), ("test", parts.test)):
            if own is None:
                continue
            asked = getattr(self, name)
            if asked != type(self).model_fields[name].default:
                raise DataError(f"{self} has its own {name} images; leave out {name}={asked}.")
            if parts.train.images.shape[1:] != own.images.shape[1:]:
                raise DataError(
                    f"Training images are {tuple(parts.train.images.shape[1:])}, {name} images "
                    f"{tuple(own.images.shape[1:])} (channels, height, width); they must agree."
                )
        return divide(
            parts,
            test_share=0.2 if self.test is None else self.test,
            validation_share=self.validation,
            count=self.count,
            seed=self.seed,
        )
