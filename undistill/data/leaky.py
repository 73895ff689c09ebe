"""The mistake of the authors' code, to be measured: epochs are chosen by the test images."""

from dataclasses import dataclass, replace
from typing import Self

from pydantic import model_validator

from undistill.data.source import Source
from undistill.data.split import Data, Parts, Split


class Leaky(Source):
    """Another source, whose test images take the place of its validation images; training images are the same.

    Whatever chooses by validation then chooses by test, as the authors of "Undistillable" do, and nothing else is
    changed. Its results show what that is worth, and are no results.
    """

    offered = False

    of: str

    @model_validator(mode="after")
    def _only_seed(self) -> Self:
        fields = type(self).model_fields
        if any(getattr(self, name) != fields[name].default for name in ("validation", "test", "count")):
            raise ValueError("validation, test and count belong to the source in 'of'")
        if Source.parse(self.of).seed != fields["seed"].default:
            raise ValueError("the seed belongs to Leaky, not to the source in 'of': Leaky(of='...', seed=5)")
        return self

    def read(self) -> Parts:
        return self._source.read()

    def load(self) -> Data:
        data = self._source.load()
        return LeakyData(data.classes, data.train, data.test, data.test)

    @property
    def title(self) -> str:
        return f"{self._source.title} (selected on test)"

    @property
    def _source(self) -> Source:
        source = Source.parse(self.of)
        return source.model_copy(update={"seed": self.seed})


@dataclass(frozen=True)
class LeakyData(Data):
    """Attackers choose by the test images, too."""

    def attackers(self, validation: float, seed: int, share: float = 1.0) -> Split:
        return replace(super().attackers(validation, seed, share), validation=self.test)
