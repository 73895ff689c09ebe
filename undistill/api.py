"""`train`, `protect` and `audit`: what the command line and the README call."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from undistill.attacks.attack import Attack
from undistill.auditing.cell import Job
from undistill.auditing.launchers import Launcher
from undistill.auditing.pair import QueryOptions, VictimPair
from undistill.auditing.plan import plan
from undistill.auditing.schema import Report
from undistill.auditing.summary import summarise
from undistill.core import distributed
from undistill.core.errors import SpecError
from undistill.core.progress import Progress
from undistill.models.model import Model
from undistill.report.evidence import read_curve, write_evidence
from undistill.report.figures import label
from undistill.report.page import write_report
from undistill.runs.folder import claim
from undistill.runs.make import protect, train
from undistill.runs.run import Run
from undistill.runs.settings import recorded_settings
from undistill.training.answers import REMEMBER
from undistill.training.compute import pick_device
from undistill.training.recipe import Recipe

__all__ = ["audit", "protect", "train"]

MOST_SEEDS = 1000


def audit(
    victim: str | Path | Run,
    out: str | Path,
    *,
    honest: str | Path | Run | None = None,
    suite: str = "quick",
    attacks: Sequence[str | Attack] = (),
    students: Sequence[str | Model] = (),
    seeds: int = 3,
    recipe: Recipe | None = None,
    model: str | Model | None = None,
    device: str = "auto",
    launcher: str | Launcher = "Serial",
    remember: float = REMEMBER,
    progress: Progress | None = None,
) -> Report:
    """Audit one victim; writes report.json, report.html and report.md into `out`.

    `attacks` are added to the suite's; `students` replace its students. `recipe` is how students
    are trained, by default as the honest teacher was. Cells that `out` already holds are not done again.
    `launcher` says where cells are done: `Serial`, `Pool(workers=2)`, `Ray(address='auto')`. Each network
    answers a view once; `remember` is the disk in GiB that its answers may fill, in its run folder.
    """
    distributed.require_one("audit")
    if not 1 <= seeds <= MOST_SEEDS:
        raise SpecError(f"An audit takes 1 to {MOST_SEEDS} seeds; seeds = {seeds}.")
    launcher = Launcher.from_user(launcher)
    pair = VictimPair.of(victim, honest, range(seeds), model)
    recipe = recipe or recorded_settings(pair.honest).recipe
    pair = replace(pair, options=QueryOptions(pick_device(device), recipe.compute, remember))
    jobs = list(plan([pair], suite, attacks, students, recipe))
    for job in jobs:  # what cannot be loaded, or attacked, is said before work is done
        job.attack.check(job.pair.network(job.side))
    pair.require_finite()
    with claim(Path(out), {"command": "audit", "victim": pair.victim.digest, "honest": pair.honest.digest}):
        return perform(jobs, Path(out), suite, launcher, progress or Progress.silent())


def perform(jobs: Sequence[Job], out: Path, suite: str, launcher: Launcher, progress: Progress) -> Report:
    """Do what is not done yet, then write one report over all cells."""
    cells = launcher.run(jobs, out / "cells", progress)
    pairs = list(dict.fromkeys(job.pair for job in jobs))
    report = summarise(pairs, cells, suite, jobs[0].recipe)
    first = pairs[0]
    sheets: dict[str, Path] = {}
    for job in jobs:
        if (sheet := job.sheet(out / "cells")).exists():
            sheets.setdefault(label(job.column), sheet)
    curves = {"unprotected": read_curve(first.honest), "protected": read_curve(first.victim)}
    write_evidence(out / "evidence.npz", first.data, first.network("honest"), first.network("victim"), sheets, curves)
    write_report(report, out)
    return report
