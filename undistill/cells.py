"""`Job`: one cell of an audit, an attack with a student and a seed against one side of a subject."""

import hashlib
import json
import logging
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError

from undistill import measure
from undistill.attacks import Attack
from undistill.code import source_sha256
from undistill.engine import EXACT
from undistill.errors import NonFinite
from undistill.files import read_json, seal, unseal, write_json
from undistill.fit import Fit
from undistill.measure import evaluate
from undistill.models import Model, returned, seeded
from undistill.oracle import Oracle
from undistill.progress import Progress
from undistill.recipe import Recipe
from undistill.report.schema import Cell, Side
from undistill.seeds import derive
from undistill.store import described, environment
from undistill.subject import Subject

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One cell before it is done."""

    subject: Subject
    side: Side
    attack: Attack
    student: Model
    seed: int
    recipe: Recipe

    @property
    def key(self) -> str:
        """Names what the cell's result depends on: weights, data, specs, seed, code."""
        asked = {
            "victim": self.subject.victim.digest,
            "honest": self.subject.honest.digest,
            "none": self.subject.victim.digest,
        }
        parts = [asked[self.side], self.subject.victim.record["data_sha256"], self.side, str(self.attack)]
        parts += [str(self.student), self.seed, str(self.recipe), self.subject.share]
        refers = [spec.refers() for spec in (self.attack, self.student, self.subject.model) if spec]
        parts += [sorted(names.values()) for names in refers if names]
        parts += [source_sha256(type(spec)) for spec in (self.attack, self.student)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    @property
    def column(self) -> tuple[Side, str, str]:
        """What it has in common with the cells of other seeds."""
        return self.side, str(self.attack), str(self.student)

    @property
    def name(self) -> str:
        return f"{type(self.attack).__name__} on {self.side}, seed {self.seed}"

    def sheet(self, cells: Path) -> Path:
        """Where the attack leaves a picture of images that it made, if it makes any."""
        return cells / f"{self.key}.png"

    def run(self, cells: Path, progress: Progress, *, exact: bool = False) -> Cell:
        """The cell from its file, or trained and written there; a stopped training goes on.

        `exact` does it in the exact engine, whatever was asked for, and in a folder of its own: the other one crashed.
        """
        file, folders = cells / f"{self.key}.json", [cells / self.key, cells / f"{self.key}-exact"]
        if cell := read_cell(file, self):
            return cell
        asked, folder = self, folders[exact]
        if exact:
            subject = replace(self.subject, asking=replace(self.subject.asking, engine=EXACT))
            asked = replace(self, subject=subject, recipe=self.recipe.model_copy(update={"engine": EXACT}))
        folder.mkdir(parents=True, exist_ok=True)
        cell = asked._train(folder, self.sheet(cells), cells.parent / "engines", progress)
        write_json(file, seal(cell.model_dump()))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        return cell

    def _train(self, folder: Path, sheet: Path, trials: Path, progress: Progress) -> Cell:
        subject, data = self.subject, self.subject.data
        oracle = Oracle(subject.answers[self.side], self.attack.needs)
        seed = derive(self.seed, "student")
        student = self.student.build(data.shape, data.num_classes, seed)
        fit = Fit(
            self.recipe,
            seed,
            subject.asking.device,
            folder,
            progress,
            self.name,
            view_seed=derive(0, "views"),
            trials=trials,
            sheet=sheet,
            carried=(oracle,),
        )
        diverged = ""
        try:
            with seeded(derive(self.seed, "attack")):
                student = self.attack.run(oracle, student, subject.attackers, fit)
            student = returned(student, self.attack, data.shape, data.num_classes)
            logits = evaluate(student, data.test).cpu()
        except NonFinite as error:
            logits, diverged = torch.zeros(len(data.test), data.num_classes), str(error)
        return Cell(
            side=self.side,
            attack=str(self.attack),
            student=str(self.student),
            seed=self.seed,
            accuracy=measure.accuracy(logits, data.test.labels),
            fidelity=measure.fidelity(logits, subject.test_logits(self.side)),
            queries=oracle.queries,
            seconds=fit.seconds,
            floor=self.attack.floor,
            late_gain=late_gain(fit.history),
            engine=", ".join(dict.fromkeys(fit.engines)),
            diverged=diverged,
            environment=described(environment(subject.asking.device)),
        )


def read_cell(file: Path, job: Job) -> Cell | None:
    """The finished cell of `job`; None if it is not there, damaged, edited or another's, so that it is done again."""
    if not file.exists():
        return None
    try:
        cell = Cell.model_validate(unseal(read_json(file) or {}))
    except ValidationError:
        cell = None
    if cell and (*job.column, job.seed) == (cell.side, cell.attack, cell.student, cell.seed):
        return cell
    log.warning("%s is damaged or was edited; that cell is done again.", file)
    return None


def late_gain(history: Sequence[dict[str, float]]) -> float:
    """Validation accuracy gained in the last fifth of the epochs, each end averaged over a tenth of them."""
    width = max(len(history) // 10, 1)
    if len(history) < 3 * width:
        return 0.0
    late = [epoch["validation_accuracy"] for epoch in history]
    start = len(late) - len(late) // 5
    return statistics.fmean(late[-width:]) - statistics.fmean(late[start - width : start])
