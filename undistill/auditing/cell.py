"""`Job`: one cell of an audit, an attack with a student and a seed against one side of a pair."""

import logging
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError

from undistill.attacks.attack import Attack
from undistill.auditing.pair import VictimPair
from undistill.auditing.schema import Cell, Side
from undistill.core.errors import NonFinite
from undistill.core.files import read_json, seal, unseal, write_json
from undistill.core.identity import fingerprint, program_sha256, source_sha256
from undistill.core.progress import Progress
from undistill.core.seeds import derive, seeded
from undistill.models.model import Model, returned
from undistill.runs.environment import described, environment
from undistill.training import metrics
from undistill.training.compute import EXACT
from undistill.training.fit import Fit
from undistill.training.metrics import evaluate
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Oracle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One cell before it is done."""

    pair: VictimPair
    side: Side
    attack: Attack
    student: Model
    seed: int
    recipe: Recipe

    @property
    def key(self) -> str:
        """Names what the cell's result depends on: weights, data, specs, seed, code."""
        asked = {
            "victim": self.pair.victim.digest,
            "honest": self.pair.honest.digest,
            "none": self.pair.victim.digest,
        }
        parts = [asked[self.side], self.pair.victim.record["data_sha256"], self.side, str(self.attack)]
        parts += [str(self.student), self.seed, str(self.recipe), self.pair.share]
        refers = [spec.refers() for spec in (self.attack, self.student, self.pair.model) if spec]
        parts += [sorted(names.values()) for names in refers if names]
        parts += [program_sha256(Path(__file__)), *(source_sha256(type(spec)) for spec in (self.attack, self.student))]
        return fingerprint(*parts)[:20]

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

        `exact` does it with exact compute settings and in a folder of its own: the settings asked for crashed.
        """
        file, folders = cells / f"{self.key}.json", [cells / self.key, cells / f"{self.key}-exact"]
        if cell := read_cell(file, self):
            return cell
        asked, folder = self, folders[exact]
        if exact:
            pair = replace(self.pair, options=replace(self.pair.options, compute=EXACT))
            asked = replace(self, pair=pair, recipe=self.recipe.model_copy(update={"compute": EXACT}))
        folder.mkdir(parents=True, exist_ok=True)
        cell = asked._train(folder, self.sheet(cells), cells.parent / "autotune", progress)
        write_json(file, seal(cell.model_dump()))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        return cell

    def _train(self, folder: Path, sheet: Path, trials: Path, progress: Progress) -> Cell:
        pair, data = self.pair, self.pair.data
        oracle = Oracle(pair.answers[self.side], self.attack.needs)
        seed = derive(self.seed, "student")
        student = self.student.build(data.shape, data.num_classes, seed)
        fit = Fit(
            self.recipe,
            seed,
            pair.options.device,
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
                student = self.attack.run(oracle, student, pair.attackers, fit)
            student = returned(student, self.attack, data.shape, data.num_classes)
            logits = evaluate(student, data.test).cpu()
        except NonFinite as error:
            logits, diverged = torch.zeros(len(data.test), data.num_classes), str(error)
        return Cell(
            side=self.side,
            attack=str(self.attack),
            student=str(self.student),
            seed=self.seed,
            accuracy=metrics.accuracy(logits, data.test.labels),
            fidelity=metrics.fidelity(logits, pair.test_logits(self.side)),
            queries=oracle.queries,
            seconds=fit.seconds,
            floor=self.attack.floor,
            late_gain=late_gain(fit.history),
            compute=", ".join(dict.fromkeys(fit.computed)),
            diverged=diverged,
            environment=described(environment(pair.options.device)),
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
