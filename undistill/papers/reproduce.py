"""`undistill reproduce`: measure the cases of one experiment, and lay them beside the published values."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from undistill.core.errors import SpecError, StoreError, unknown
from undistill.core.files import write_text
from undistill.data.leaky import Leaky
from undistill.papers import ablations, tables
from undistill.papers.case import Case, Runner, Teacher
from undistill.papers.forecast import describe, forecast
from undistill.papers.scales import Scale, parse_scale
from undistill.report.table import Row, Table, read_table, write_table
from undistill.runs.folder import claim
from undistill.training.metrics import DIVERGENCE_T
from undistill.training.recipe import Recipe

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


def row_of(case: Case) -> Row:
    """The row of a case, in which nothing is measured yet."""
    everything = repr(replace(case, name="", published=None))
    student = str(case.student or "")
    teacher = str(case.teacher.model)
    return Row(name=case.name, published=case.published, teacher=teacher, student=student, measured={}, case=everything)


HEADER = ["value", "published (unverified)", "measured", "n", "T²KL"]


def find(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise SpecError(unknown("experiment", name, EXPERIMENTS))
    return EXPERIMENTS[name]


def caveat(rows: Sequence[Row]) -> str:
    """Footnote naming the networks actually used; the rows have the paper's names."""
    teachers = ", ".join(dict.fromkeys(row.teacher for row in rows))
    students = ", ".join(dict.fromkeys(row.student for row in rows if row.student))
    return (
        f"Teachers here: {teachers}; students: {students or 'none'}. "
        "Published values are those of the paper's networks and all images. "
        "Measured: test accuracy in percent, ± half a 95 % t interval over n seeds; T²KL in nats at T "
        f"{DIVERGENCE_T:g}."
    )


def about(experiment: Experiment) -> str:
    """Its docstring, in one line."""
    return " ".join((inspect.getdoc(experiment) or "").split())


def reproduce(
    name: str,
    scale: str,
    seeds: Sequence[int],
    cells: str,
    runner: Runner,
    *,
    select_on_test: bool = False,
    dry_run: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure every case of `name` whose name matches the pattern `cells`, for these seeds, beside what the table
    holds of others already; it is written after each teacher's figures. What it holds of cases that are no longer
    asked for, because a setting was changed, is kept under "earlier".

    Teachers and cells that the runner's folder holds are not done again, whichever experiment asked for them; nor are
    values that the table holds, if they were measured by the same code on the same images, which must be there, and on
    the same kind of machine.
    `select_on_test` keeps the epoch that is best on the test images, as the authors' code does. The difference to the
    plain table is the selection alone; at `small` and `smoke`, whose plain recipes keep the last epoch, it is that of
    best and last as well. Attacks without data choose nothing themselves; only their victim is another.
    `dry_run` is told what would be done, and about how long that takes; nothing is done then.
    """
    cases = find(name)(parse_scale(scale))
    chosen = [case for case in cases if fnmatch(case.name, cells)]
    if not chosen:
        raise SpecError(unknown("value", cells, [case.name for case in cases]))
    names = {case.name for case in chosen}
    if select_on_test:
        cases, name = [selected_on_test(case) for case in cases], f"{name}-selected-on-test"
    chosen = [case for case in cases if case.name in names]
    path = runner.folder / f"{name}-{scale}"
    rows = {case.name: row_of(case) for case in cases}

    def missing() -> dict[int, list[Case]]:
        return {
            seed: [case for case in chosen if not rows[case.name].holds(seed, runner.code(case, seed))]
            for seed in seeds
        }

    if dry_run:
        recall(path, list(rows.values()))
        dry_run(describe(missing(), len(chosen)))
        dry_run(str(forecast(missing(), runner)))
        return []
    with claim(runner.folder, {"command": "reproduce"}):
        kept = recall(path, list(rows.values()))
        todo = missing()
        runner.progress.say(describe(todo, len(chosen)))
        for seed in seeds:
            for case, measured in runner.measure(todo[seed], seed):
                rows[case.name].measured[seed] = measured
                write(path, list(rows.values()), kept)
    return [rows[case.name] for case in chosen]


def recall(path: Path, rows: Sequence[Row]) -> list[Row]:
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
        for held in known:
            row.measured.update(held.measured if held.case == row.case else {})
    asked = {row.case for row in rows}
    return [held for held in known if held.case not in asked]


def selected_on_test(case: Case) -> Case:
    """The same case with the authors' mistake, in every training that it takes."""
    adversary = _leaky(case.adversary) if case.adversary else None
    return replace(case, teacher=_leaky(case.teacher), adversary=adversary, recipe=_best(case.recipe))


def _leaky(teacher: Teacher) -> Teacher:
    return replace(teacher, data=Leaky(of=str(teacher.data)), recipe=_best(teacher.recipe))


def _best(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"selection": "best"})


def write(path: Path, rows: Sequence[Row], earlier: Sequence[Row]) -> None:
    """The table as Markdown, and as JSON with the values by seed; both say on what they were measured."""
    done = [row for row in rows if row.measured]
    header = [*HEADER, "teacher's network", "student's network", "measured on"]
    table = [[*row.cells(), row.teacher, row.student, row.environments] for row in done]
    lines = [header, ["---"] * len(header), *table]
    write_text(path.with_suffix(".md"), "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{caveat(done)}\n")
    write_table(path.with_suffix(".json"), Table(rows=done, earlier=list(earlier)))
