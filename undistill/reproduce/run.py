"""`undistill reproduce`: measure the figures of one experiment, and lay them beside the published ones."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from undistill.errors import SpecError, StoreError, unknown
from undistill.files import write_text
from undistill.measure import DIVERGENCE_T
from undistill.recipe import Recipe
from undistill.report.table import Line, Measured, Table, read_table, write_table
from undistill.reproduce import ablations, tables
from undistill.reproduce.case import Case, Teacher, Workshop
from undistill.reproduce.scales import Scale, parse_scale
from undistill.store import claim
from undistill.verdict import interval

Experiment = Callable[[Scale], list[Case]]

EXPERIMENTS: dict[str, Experiment] = {
    "table1": tables.table1,
    "table2": tables.table2,
    "table3": tables.table3,
    "data-free": tables.data_free,
    "fashion": tables.fashion,
    "omega": ablations.omega,
    "published-omegas": ablations.published_omegas,
    "adversary-temperature": ablations.adversary_temperature,
    "adversary": ablations.adversary,
    "temperature": ablations.temperature,
    "alpha": ablations.alpha,
    "samples": ablations.samples,
    "student-epochs": ablations.student_epochs,
    "stronger-student": ablations.stronger_student,
    "collapse": ablations.collapse,
    "nan": ablations.nan,
}


@dataclass
class Row:
    """One figure, by seed."""

    case: Case
    measured: dict[int, Measured] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """All on which the figure depends."""
        return repr(replace(self.case, name="", published=None))

    @property
    def line(self) -> Line:
        """What a later call finds again, and what curves are drawn from."""
        case = self.case
        return Line(
            name=case.name,
            published=case.published,
            teacher=case.teacher.model,
            student=case.student,
            measured=dict(sorted(self.measured.items())),
            case=self.key,
        )

    def holds(self, seed: int, code: str) -> bool:
        """Whether the figure of that seed is known, and was measured by that code."""
        return seed in self.measured and self.measured[seed].code == code

    def cells(self) -> list[str]:
        """Name, published, measured with its 95 % interval, n, divergence."""
        reached = self.line.divergence
        divergence = "" if reached is None else f"{reached:.1f}"
        published = "-" if self.case.published is None else f"{self.case.published:.2f}"
        return [self.case.name, published, self._accuracy(), str(len(self.measured)), divergence]

    def _accuracy(self) -> str:
        accuracies = self.line.accuracies
        lost = len(self.measured) - len(accuracies)
        said = f"{lost} diverged" if lost else ""
        if not accuracies:
            return said
        spread = interval(accuracies)
        half = f" ± {spread.high - spread.mean:.1f}" if spread.high is not None else ""
        return f"{spread.mean:.1f}{half}" + (f", {said}" if said else "")

    @property
    def environments(self) -> str:
        """On what it was measured; a table may be filled on several machines."""
        return "; ".join(sorted({one.environment for one in self.measured.values()}))


HEADER = ["figure", "published (unverified)", "measured", "n", "T²KL"]


def find(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise SpecError(unknown("experiment", name, EXPERIMENTS))
    return EXPERIMENTS[name]


def caveat(rows: Sequence[Row]) -> str:
    """What the networks really were, which have the paper's names in the rows."""
    teachers = ", ".join(dict.fromkeys(row.case.teacher.model for row in rows))
    students = ", ".join(dict.fromkeys(row.case.student for row in rows if row.case.student))
    return (
        f"Teachers here: {teachers}; students: {students or 'none'}. "
        "Published figures are those of the paper's networks and all images. "
        "Measured: test accuracy in percent, ± half a 95 % t interval over n seeds; T²KL in nats at T "
        f"{DIVERGENCE_T:g}."
    )


def about(experiment: Experiment) -> str:
    """Its docstring, in one line."""
    return " ".join((inspect.getdoc(experiment) or "").split())


def reproduce(
    name: str, scale: str, seeds: Sequence[int], cells: str, workshop: Workshop, *, as_authors: bool = False
) -> list[Row]:
    """Measure every case of `name` whose name matches the pattern `cells`, for these seeds, beside what the table
    holds of others already; it is written after each teacher's figures. What it holds of cases that are no longer
    asked for, because a setting was changed, is kept under "earlier".

    Teachers and cells that the workshop's folder holds are not done again, whichever experiment asked for them; nor are
    figures that the table holds, if they were measured by the same code on the same images, which must be there, and on
    the same kind of machine.
    `as_authors` keeps the epoch that is best on the test images, as the authors' code does. The difference to the plain
    table is the selection alone; at `small` and `smoke`, whose plain recipes keep the last epoch, that of best and last
    as well. Attacks without data choose nothing themselves; only their victim is another.
    """
    cases = find(name)(parse_scale(scale))
    chosen = [case for case in cases if fnmatch(case.name, cells)]
    if not chosen:
        raise SpecError(unknown("figure", cells, [case.name for case in cases]))
    names = {case.name for case in chosen}
    if as_authors:
        cases, name = [selected_on_test(case) for case in cases], f"{name}-selected-on-test"
    chosen = [case for case in cases if case.name in names]
    path = workshop.folder / f"{name}-{scale}"
    with claim(workshop.folder, {"command": "reproduce"}):
        rows = {case.name: Row(case) for case in cases}
        kept = recall(path, list(rows.values()))
        for seed in seeds:
            missing = [case for case in chosen if not rows[case.name].holds(seed, workshop.code(case, seed))]
            for case, measured in workshop.measure(missing, seed):
                rows[case.name].measured[seed] = measured
                write(path, list(rows.values()), kept)
    return [rows[case.name] for case in chosen]


def recall(path: Path, rows: Sequence[Row]) -> list[Line]:
    """Fill `rows` with what the table holds of them already, and return the others; `StoreError` if it is damaged."""
    file = path.with_suffix(".json")
    if not file.exists():
        return []
    try:
        table = read_table(file)
    except StoreError as error:
        raise StoreError(f"{error} Remove it; what it was made from is kept, and read again.") from None
    known = [*table.rows, *table.earlier]
    for row in rows:
        for line in known:
            row.measured |= line.measured if line.case == row.key else {}
    keys = {row.key for row in rows}
    return [line for line in known if line.case not in keys]


def selected_on_test(case: Case) -> Case:
    """The same figure with the authors' mistake, in every training that it takes."""
    adversary = _leaky(case.adversary) if case.adversary else None
    return replace(case, teacher=_leaky(case.teacher), adversary=adversary, recipe=_best(case.recipe))


def _leaky(teacher: Teacher) -> Teacher:
    return replace(teacher, data=f"Leaky(of={teacher.data!r})", recipe=_best(teacher.recipe))


def _best(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"selection": "best"})


def write(path: Path, rows: Sequence[Row], earlier: Sequence[Line]) -> None:
    """The table as Markdown, and as JSON with the figures by seed; both say on what they were measured."""
    done = [row for row in rows if row.measured]
    header = [*HEADER, "teacher's network", "student's network", "measured on"]
    table = [[*row.cells(), row.case.teacher.model, row.case.student, row.environments] for row in done]
    lines = [header, ["---"] * len(header), *table]
    write_text(path.with_suffix(".md"), "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{caveat(done)}\n")
    write_table(path.with_suffix(".json"), Table(rows=[row.line for row in done], earlier=list(earlier)))
