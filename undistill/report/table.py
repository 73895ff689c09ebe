"""The table of `undistill reproduce` as it lies on disk: written by it, and what curves are drawn from."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError

from undistill.errors import StoreError, legible
from undistill.files import parse_json, read_text, write_json
from undistill.report.schema import Number, Part, Text

Percent = Annotated[float, Field(ge=0, le=100)]


@dataclass(frozen=True)
class Measured:
    """One figure for one seed. Accuracies are in percent."""

    accuracy: Percent
    divergence: Number | None = None
    """T^2 KL of the victim's answers from the honest twin's, in nats; None for an honest teacher."""
    validation_accuracy: Percent | None = None
    """Of a teacher: what choices may be made by."""
    train_accuracy: Percent | None = None
    """Of a teacher: how far it fits the images that it was trained on, unaugmented."""
    diverged: str = ""
    """Why training ended without a network."""
    environment: str = ""
    """On what it was measured, in words."""
    code: str = ""
    """Hash of all code and data that it depends on, and of the kind of machine."""
    sheet: str = ""
    """Where the images lie that an attack without data made, seen from the folder of the table."""


class Line(Part):
    """One figure, by seed. What earlier versions wrote beside it is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: Annotated[str, Field(max_length=300)]
    published: Number | None = None
    teacher: Text = ""
    student: Text = ""
    measured: Annotated[dict[int, Measured], Field(max_length=1000)]
    case: str = ""
    """All on which the figure depends."""

    @property
    def accuracies(self) -> list[float]:
        """Percent, of the seeds whose training did not diverge."""
        return [one.accuracy for _, one in sorted(self.measured.items()) if not one.diverged]

    @property
    def divergence(self) -> float | None:
        """Mean over seeds; None for an honest teacher."""
        known = [one.divergence for one in self.measured.values() if one.divergence is not None]
        return statistics.fmean(known) if known else None


class Table(Part):
    rows: Annotated[list[Line], Field(max_length=2000)]
    earlier: list[Line] = Field(default_factory=list)
    """Figures of cases that are no longer asked for, because a setting was changed."""


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
