"""A source whose test images are those of another."""

from dataclasses import replace
from typing import Self

import torch

from undistill.core.errors import DataError, remark
from undistill.data.copies import comparable
from undistill.data.source import Source
from undistill.data.split import Parts, Samples, joined, require_labels


class Apart(Source):
    """Images of one source to train on, and those of another to measure with, which the model has never seen."""

    offered = False

    of: str
    test_on: str
    """The source of the test images, all of which are used but for those that are also in `of`."""

    @classmethod
    def join(cls, own: Source, other: Source) -> Self:
        """`own`, divided as it says, with the test images of `other`."""
        if own.test != type(own).model_fields["test"].default:
            raise DataError(f"Test images are named by {other}; leave out test={own.test}.")
        return cls(of=str(own), test_on=str(other), validation=own.validation, count=own.count, seed=own.seed)

    @property
    def title(self) -> str:
        return Source.parse(self.of).title

    def read(self) -> Parts:
        own, other = Source.parse(self.of).read(), Source.parse(self.test_on).read()
        test = self._named_alike(_all(other), list(other.classes), list(own.classes))
        train = _all(own)
        ours, theirs = comparable(train, test)
        known = set(ours)
        unseen = [number for number, image in enumerate(theirs) if image not in known]
        if not unseen:
            raise DataError(f"All images of {self.test_on} are also in {self.of}, so that none of them is unseen.")
        if len(unseen) < len(test):
            remark(f"{len(test) - len(unseen):,} test images are also in {self.of}; they are left out of the test.")
        return replace(own, train=train, validation=None, test=test[torch.tensor(unseen)])

    def _named_alike(self, test: Samples, theirs: list[str], ours: list[str]) -> Samples:
        """Test images with the labels that their classes have here; a class may be missing among them."""
        if strange := [name for name in theirs if name not in ours]:
            raise DataError(
                f"{self.of} has the classes {', '.join(ours[:5])} ..., {self.test_on} has {', '.join(strange[:5])}, "
                "which is none of them; test images must be of the same classes, called the same."
            )
        require_labels(test, theirs)
        labels = torch.tensor([ours.index(name) for name in theirs])
        return Samples(test.images, labels[test.labels])


def _all(parts: Parts) -> Samples:
    """Every image of a source, in one part."""
    return joined([part for part in (parts.train, parts.validation, parts.test) if part is not None])
