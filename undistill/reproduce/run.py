"""`undistill reproduce`: measure the figures of one experiment, and lay them beside the published ones."""

import inspect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from undistill.errors import SpecError, unknown
from undistill.files import write_json, write_text
from undistill.reproduce import ablations, tables
from undistill.reproduce.case import Case, Measured, Workshop
from undistill.reproduce.scales import Scale, parse_scale
from undistill.store import claim, environment
from undistill.verdict import interval

Experiment = Callable[[Scale], list[Case]]

EXPERIMENTS: dict[str, Experiment] = {
    "table1": tables.table1,
    "table2": tables.table2,
    "table3": tables.table3,
    "fashion": tables.fashion,
    "omega": ablations.omega,
    "published-omegas": ablations.published_omegas,
    "adversary-temperature": ablations.adversary_temperature,
    "adversary": ablations.adversary,
    "temperature": ablations.temperature,
    "alpha": ablations.alpha,
    "samples": ablations.samples,
    "stronger-student": ablations.stronger_student,
    "collapse": ablations.collapse,
}


@dataclass
class Row:
    """One figure, over seeds. Percent."""

    name: str
    published: float | None
    teacher: str = ""
    student: str = ""
    accuracies: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    def add(self, measured: Measured) -> None:
        self.accuracies.append(100 * measured.accuracy)
        if measured.divergence is not None:
            self.divergences.append(measured.divergence)
        if measured.validation_accuracy is not None:
            self.validation.append(100 * measured.validation_accuracy)

    def cells(self) -> list[str]:
        """Name, published, measured with its 95 % interval, n, divergence."""
        spread = interval(self.accuracies)
        half = f" ± {spread.high - spread.mean:.1f}" if spread.high is not None else ""
        divergence = f"{statistics.fmean(self.divergences):.1f}" if self.divergences else ""
        published = "-" if self.published is None else f"{self.published:.2f}"
        return [self.name, published, f"{spread.mean:.1f}{half}", str(spread.n), divergence]


HEADER = ["figure", "published (unverified)", "measured", "n", "T²KL"]


def find(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise SpecError(unknown("experiment", name, EXPERIMENTS))
    return EXPERIMENTS[name]


def networks(rows: Sequence[Row]) -> str:
    """What the networks really were, which have the paper's names in the rows."""
    teachers, students = (dict.fromkeys(getattr(row, who) for row in rows) for who in ("teacher", "student"))
    return f"Teachers here: {', '.join(teachers)}; students: {', '.join(filter(None, students)) or 'none'}."


def about(experiment: Experiment) -> str:
    """The first paragraph of its docstring."""
    return " ".join((inspect.getdoc(experiment) or "").split("\n\n")[0].split())


def reproduce(
    name: str, scale: str, seeds: Sequence[int], cells: str, workshop: Workshop, *, as_authors: bool = False
) -> list[Row]:
    """Measure every case of `name` whose name matches the pattern `cells`; the table is written after each figure.

    Teachers and cells that the workshop's folder holds are not done again, whichever experiment asked for them.
    `as_authors` chooses epochs by the test images, as the authors' code does.
    """
    cases = find(name)(parse_scale(scale))
    chosen = [case for case in cases if fnmatch(case.name, cells)]
    if not chosen:
        raise SpecError(unknown("figure", cells, [case.name for case in cases]))
    if as_authors:
        chosen, name = [selected_on_test(case) for case in chosen], f"{name}-selected-on-test"
    rows = {case.name: Row(case.name, case.published, case.teacher.model, case.student) for case in chosen}
    with claim(workshop.folder, {"command": "reproduce"}):
        for case, _seed, measured in workshop.measure(chosen, seeds):
            rows[case.name].add(measured)
            write(workshop.folder / f"{name}-{scale}", name, scale, seeds, list(rows.values()))
    return list(rows.values())


def selected_on_test(case: Case) -> Case:
    """The same figure with the authors' mistake."""
    best = {"selection": "best"}
    teacher = replace(
        case.teacher, data=f"Leaky(of={case.teacher.data!r})", recipe=case.teacher.recipe.model_copy(update=best)
    )
    return replace(case, teacher=teacher, recipe=case.recipe.model_copy(update=best))


def write(path: Path, name: str, scale: str, seeds: Sequence[int], rows: Sequence[Row]) -> None:
    """The table as Markdown, and as JSON with what it was measured on."""
    header = [*HEADER, "teacher's network", "student's network"]
    table = [[*row.cells(), row.teacher, row.student] for row in rows if row.accuracies]
    lines = [header, ["---"] * len(header), *table]
    write_text(path.with_suffix(".md"), "".join(f"| {' | '.join(line)} |\n" for line in lines))
    record = {"experiment": name, "scale": scale, "seeds": list(seeds), "environment": environment()}
    write_json(path.with_suffix(".json"), record | {"rows": [vars(row) for row in rows]})
