"""A source whose test images are those of another."""

from dataclasses import replace

import torch

from undistill.core.errors import DataError
from undistill.data.files import ImageFiles
from undistill.data.source import Source
from undistill.data.split import Parts, Samples


class Apart(Source):
    """Images of one source to train on, and those of another to measure with, which the model has never seen."""

    offered = False

    of: str
    test_on: str
    """The source of the test images, all of which are used."""

    @property
    def title(self) -> str:
        return Source.parse(self.of).title

    def read(self) -> Parts:
        own, other = Source.parse(self.of).read(), Source.parse(self.test_on).read()
        if list(own.classes) != list(other.classes):
            raise DataError(
                f"{self.of} has the classes {', '.join(own.classes[:5])} ..., {self.test_on} has "
                f"{', '.join(other.classes[:5])} ...; test images must be of the same classes, called the same."
            )
        return replace(own, train=_all(own), validation=None, test=_all(other))


def _all(parts: Parts) -> Samples:
    """Every image of a source, in one part."""
    found = [part for part in (parts.train, parts.validation, parts.test) if part is not None]
    if len(found) == 1:
        return found[0]
    if any(isinstance(part.images, ImageFiles) for part in found):
        raise DataError("Parts that stay in their files cannot be joined; name the folder of one of them.")
    return Samples(torch.cat([part.pixels for part in found]), torch.cat([part.labels for part in found]))
