"""The table of `undistill reproduce` as it lies on disk: written by it, and what curves are drawn from."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError, field_validator

from undistill.auditing.schema import Number, Part, Text, plus_minus
from undistill.auditing.statistics import interval
from undistill.core.errors import StoreError, legible
from undistill.core.files import parse_json, read_text, write_json

Percent = Annotated[float, Field(ge=0, le=100)]


@dataclass(frozen=True)
class Measured:
    """One value for one seed. Accuracies are in percent."""

    accuracy: Percent
    divergence: Number | None = None
    """T^2 KL of the victim's answers from the honest twin's, in nats; None for an honest teacher."""
    validation_accuracy: Percent | None = None
    """Validation accuracy of a teacher, by which choices may be made."""
    train_accuracy: Percent | None = None
    """Accuracy of a teacher on its own training images, unaugmented."""
    diverged: str = ""
    """Why training ended without a network."""
    environment: str = ""
    """Code and machine of the measurement, in words."""
    code: str = ""
    """Hash of the code and data that the value depends on, and of the kind of machine."""
    sheet: str = ""
    """Path of the picture of images that a data-free attack made, relative to the folder of the table."""


class Row(Part):
    """One value of a table, measured with several seeds. What earlier versions wrote beside it is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: Annotated[str, Field(max_length=300)]
    published: Number | None = None
    """Percent, as the paper reports it."""
    teacher: Text = ""
    student: Text = ""
    measured: Annotated[dict[int, Measured], Field(max_length=1000)]
    """Measurements by seed."""
    case: str = ""
    """Everything on which the value depends, but for the seed."""

    @field_validator("case")
    @classmethod
    def _earlier_names(cls, case: str) -> str:
        """`compute` was called `engine` in tables of earlier versions."""
        return case.replace("engine=Engine(", "compute=Compute(")

    def holds(self, seed: int, code: str) -> bool:
        """Whether the value for that seed is known, and was measured by that code."""
        return seed in self.measured and self.measured[seed].code == code

    @property
    def accuracies(self) -> list[float]:
        """Percent, of the seeds whose training did not diverge."""
        return [one.accuracy for _, one in sorted(self.measured.items()) if not one.diverged]

    @property
    def divergence(self) -> float | None:
        """Mean over seeds; None for an honest teacher."""
        known = [one.divergence for one in self.measured.values() if one.divergence is not None]
        return statistics.fmean(known) if known else None

    @property
    def environments(self) -> str:
        """Machines on which it was measured; a table may be filled on several."""
        return "; ".join(sorted({one.environment for one in self.measured.values()}))

    def cells(self) -> list[str]:
        """Name, published value, measured value with its 95 % interval, n, divergence."""
        divergence = "" if self.divergence is None else f"{self.divergence:.1f}"
        published = "-" if self.published is None else f"{self.published:.2f}"
        return [self.name, published, self._accuracy(), str(len(self.measured)), divergence]

    def _accuracy(self) -> str:
        lost = len(self.measured) - len(self.accuracies)
        said = [plus_minus(interval(self.accuracies))] if self.accuracies else []
        return ", ".join([*said, f"{lost} diverged"] if lost else said)


class Table(Part):
    rows: Annotated[list[Row], Field(max_length=2000)]
    earlier: list[Row] = Field(default_factory=list)
    """Values of cases that are no longer asked for, because a setting was changed."""


def read_table(file: Path) -> Table:
    """`StoreError` for anything else."""
    if not file.exists():
        raise StoreError(f"There is no table {file}; 'undistill reproduce' writes one.")
    try:
        return Table.model_validate(parse_json(read_text(file)))
    except ValidationError as error:  # a ValueError, too
        first = error.errors()[0]
        why = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
    except ValueError as error:
        why = legible(str(error))
    raise StoreError(f"{file} is damaged, or no table of 'undistill reproduce' ({why}).")


def write_table(file: Path, table: Table) -> None:
    write_json(file, table.model_dump())
