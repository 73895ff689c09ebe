"""`Job`: one cell of an audit, an attack with a student and a seed against one side of a pair.

Here are the key under which its result is stored, and the training of its student.
"""

import logging
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from undistill.attacks.attack import Attack, Buying, QueryAttack, Role, ThiefData
from undistill.attacks.data_free.synthesis import without_images
from undistill.auditing.pair import VictimPair
from undistill.auditing.predictions import predicted, written
from undistill.auditing.schema import Cell, Side, Threat, Trial
from undistill.auditing.students import Students
from undistill.core.errors import BudgetExceeded, NonFinite, SpecError, Unsuitable
from undistill.core.files import read_json, seal, unseal, write_json
from undistill.core.identity import fingerprint, program_sha256, source_sha256
from undistill.core.progress import Progress
from undistill.core.seeds import derive, seeded
from undistill.data.split import Split
from undistill.models.model import Model
from undistill.models.trial import returned
from undistill.runs.contact import Contact
from undistill.runs.environment import described, environment
from undistill.runs.run import Run
from undistill.training import metrics
from undistill.training.compute import EXACT
from undistill.training.fit import Fit
from undistill.training.metrics import evaluate
from undistill.training.recipe import Recipe
from undistill.victims.endpoint import Endpoint
from undistill.victims.oracle import Access, Oracle
from undistill.victims.victim import NetworkVictim, Victim

log = logging.getLogger(__name__)

Result = Cell | Trial

KNOWING = (Role.ADAPTIVE, Role.RECOVERY, Role.BOUND)
"""Roles of thieves who know the defence."""


@dataclass(frozen=True)
class Job:
    """One cell before it is done."""

    pair: VictimPair
    side: Side
    attack: Attack
    student: Model
    seed: int
    recipe: Recipe
    budget: int | None = None
    """The most queries that the thief may make, or the images of one who asks nothing; None is unlimited."""
    listed: str = ""
    """Text of the attack before its thief tuned it, where that is another."""

    kind: ClassVar[type[Cell] | type[Trial]] = Cell

    @property
    def key(self) -> str:
        """Names everything on which the cell's result depends: weights, responses, data, specs, seed, code.

        A student who asked nobody is the same whatever victim it is compared with, see `relisted`.
        """
        run = None if self._asks_nobody else self._run
        asked = [run and run.identity, self.pair.victim.record["data_sha256"], str(self.attack)]
        thief = [str(self.student), self.seed, str(self.schedule), self.pair.share, self.budget]
        if self.attack.data == ThiefData.SURROGATE:
            thief.append(self.pair.surrogate.train.digest.hex())
        refers = [spec.refers() for spec in (self.attack, self.student, self.pair.model) if spec]
        if self.kind is Trial:
            thief += ["trial", (self._buyer, self.recipe.epochs) if self._is_allotted else None]
        code: list[object] = [sorted(names.values()) for names in refers if names]
        code += [program_sha256(Path(__file__)), *(source_sha256(type(spec)) for spec in (self.attack, self.student))]
        return fingerprint(*asked, *thief, *code, run and run.program)[:20]

    @property
    def _run(self) -> Run | Contact:
        """The run that is asked, or compared with."""
        return self.pair.runs.get(self.side, self.pair.victim)

    @property
    def _asks_nobody(self) -> bool:
        return self.side == "none" and self.attack.data == ThiefData.LABELLED

    def check(self) -> None:
        """`Unsuitable` or `SpecError` for what cannot be tried; an audit asks before it trains anything."""
        victim = self.pair.victims[self.side]
        self._check_space()
        self._check_black_box(victim)
        self.attack.check(victim.bare if isinstance(victim, NetworkVictim) else None, self._students)
        if self.attack.needs == Access.QUERY and self.attack.form > victim.form:
            raise Unsuitable(
                f"{self.attack} needs answers of the form {self.attack.form.name}, and this victim's show no more than "
                f"{victim.form.name}."
            )
        if self.attack.data == ThiefData.SURROGATE:
            self._check_pool()
        if self.attack.needs and self._is_allotted and self._affordable < 2:
            raise SpecError(
                f"A budget of {self.budget} queries buys {self.attack} less than two images in {self.recipe.epochs} "
                "epochs. Raise --budget, or lower recipe.epochs."
            )

    def _check_black_box(self, victim: Victim) -> None:
        if isinstance(victim, Endpoint) and self.attack.needs == Access.WEIGHTS:
            raise Unsuitable(f"{self.attack} needs the weights, and this victim is a black box.")
        if isinstance(victim, Endpoint) and self.attack.needs and not (victim.any_image or self.attack.asks_own_images):
            raise Unsuitable(
                f"{self.attack} asks about images of which no answers were recorded, such as views or images it makes."
            )

    def _check_space(self) -> None:
        known = self.attack.model_dump()
        for name, values in self.attack.space.items():
            for value in values:
                try:
                    type(self.attack)(**(known | {name: value}))
                except SpecError as error:
                    raise SpecError(f"The search space of {type(self.attack).__name__}: {error}") from None

    def _check_pool(self) -> None:
        if not self.pair.pool:
            raise SpecError(f"{self.attack} needs other images than the owner's; name some: --pool DATA.")
        pool = len(self.pair.surrogate.train)
        if self.budget is not None and self.budget > pool:
            raise SpecError(f"The pool has {pool:,} images, and the budget is {self.budget:,}; lower --budget.")

    @property
    def _is_allotted(self) -> bool:
        """Whether the budget decides how many images the thief gets."""
        if self.budget is None or self.attack.buying == Buying.CHOSEN:
            return False
        return isinstance(self.attack, QueryAttack) or self.attack.needs != Access.WEIGHTS

    @property
    def _affordable(self) -> int:
        """How many images the budget buys to a thief who does not choose."""
        assert self.budget is not None
        asks = self.attack.queries_per_image(self.recipe) if self.attack.needs else 1
        return self.budget // max(asks, 1)

    @property
    def schedule(self) -> Recipe:
        """How the student is trained in fact."""
        return self.recipe

    @property
    def _students(self) -> Students:
        return Students(self.student, self.pair.data.shape, self.pair.data.num_classes, self.seed)

    @property
    def data(self) -> Split:
        """Data of the thief: images that he can afford answers for, without labels if he needs none."""
        split = self.pair.attackers
        if self.attack.data == ThiefData.NONE:
            return without_images(split)
        if self.attack.data == ThiefData.SURROGATE:
            split = self.pair.surrogate
        if self.attack.data == ThiefData.UNLABELLED:
            split = split.unlabelled
        if self._is_allotted:
            split = split.some(self._affordable, derive(self._buyer, "bought"))
        return split

    @property
    def _buyer(self) -> int:
        """The seed that draws the images for which a budget buys answers."""
        return self.seed

    @property
    def column(self) -> tuple[Side, str, str]:
        """Key under which cells are averaged over seeds."""
        return self.side, str(self.attack), str(self.student)

    @property
    def name(self) -> str:
        return f"{type(self.attack).__name__} on {self.side}, seed {self.seed}"

    @property
    def threat(self) -> Threat:
        """The thief's access, data and way of asking."""
        access = {Access.NONE: "nothing", Access.QUERY: "answers", Access.WEIGHTS: "weights"}
        return Threat(
            access=access[self.attack.needs],
            data=self.attack.data,
            form=self.attack.form.name.lower(),
            buying=self.attack.buys,
            images=0 if self.attack.data == ThiefData.NONE else self._images,
        )

    @property
    def _images(self) -> int:
        data = self.data
        count = len(data.train) + (len(data.spare) if data.spare and self.attack.passes_over_spare else 0)
        if self.attack.buying == Buying.CHOSEN and self.budget is not None:
            count = min(count, self.budget)
        return self.attack.images(count)

    @property
    def _told(self) -> str | None:
        """Text of the defences, for an adaptive thief; None for others."""
        return ", ".join(self._run.record.get("defences", ())) if self.attack.role in KNOWING else None

    def sheet(self, cells: Path) -> Path:
        """Path of the picture of images that the attack makes, if it makes any."""
        return cells / f"{self.key}.png"

    def run(self, cells: Path, progress: Progress, *, exact: bool = False, suspends: bool = False) -> Result:
        """The result from its file, or trained and written there; a stopped training goes on.

        `exact` does it with exact compute settings and in a folder of its own: the settings asked for crashed. With
        `suspends`, a training is not done: `Suspended` is raised with its loop.
        """
        file, folders = cells / f"{self.key}.json", [cells / self.key, cells / f"{self.key}-exact"]
        if result := read_result(file, self):
            return relisted(result, self)
        asked, folder = self, folders[exact]
        if exact:
            pair = replace(self.pair, options=replace(self.pair.options, compute=EXACT))
            asked = replace(self, pair=pair, recipe=self.recipe.model_copy(update={"compute": EXACT}))
        folder.mkdir(parents=True, exist_ok=True)
        fit = asked._fit(folder, self.sheet(cells), cells.parent / "autotune", progress, suspends)
        result = asked._result(asked._attack(fit))
        write_json(file, seal(result.model_dump()))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _fit(self, folder: Path, sheet: Path, trials: Path, progress: Progress, suspends: bool) -> Fit:
        """The training of a student, which shows the same views in every cell."""
        return Fit(
            self.schedule,
            derive(self.seed, "student"),
            self.pair.options.device,
            folder,
            progress,
            self.name,
            view_seed=derive(0, "views"),
            trials=trials,
            sheet=sheet,
            suspends=suspends,
        )

    def _attack(self, fit: Fit) -> "Outcome":
        """The student that the thief trains; None where there is none, since training diverged or the budget ended."""
        pair, needs = self.pair, self.attack.needs
        oracle = Oracle(pair.victims[self.side], needs, self.budget if needs else None, told=self._told, name=self.key)
        fit.carried = (oracle,)
        try:
            with seeded(derive(self.seed, "attack")):
                attack = self.attack.model_copy()  # what it keeps to itself is not another cell's
                student = attack.run(oracle, self._students, self.data, fit)
            student = returned(student, self.attack, pair.data.shape, pair.data.num_classes)
            return Outcome(student, evaluate(student, pair.attackers.validation).cpu(), fit, oracle)
        except (NonFinite, BudgetExceeded) as error:
            blank = torch.zeros(len(pair.attackers.validation), pair.data.num_classes)
            return Outcome(None, blank, fit, oracle, str(error))

    def _result(self, outcome: "Outcome") -> Result:
        """The cell: the student measured on the test images."""
        data, ledger, fit = self.pair.data, outcome.oracle.ledger, outcome.fit
        logits, diverged = torch.zeros(len(data.test), data.num_classes), outcome.diverged
        if outcome.student:
            try:
                logits = evaluate(outcome.student, data.test).cpu()
            except NonFinite as error:
                diverged = str(error)
        ledger.evaluation += len(data.test)  # the victim's answers with which the student's are compared
        return Cell(
            side=self.side,
            attack=str(self.attack),
            listed=self.listed,
            student=str(self.student),
            seed=self.seed,
            accuracy=metrics.accuracy(logits, data.test.labels),
            fidelity=metrics.fidelity(logits, self.pair.test_logits(self.side)),
            validation=metrics.accuracy(outcome.validation, self.pair.attackers.validation.labels),
            predictions=written(logits.argmax(1).numpy(), data.num_classes),
            role=self.attack.role,
            queries=ledger.billed,
            distinct=ledger.distinct,
            budget=ledger.budget,
            threat=self.threat,
            evaluation=ledger.evaluation,
            seconds=fit.seconds,
            late_gain=late_gain(fit.history),
            compute=", ".join(dict.fromkeys(fit.computed)),
            diverged=diverged,
            environment=described(environment(self.pair.options.device)),
        )


@dataclass(frozen=True)
class Outcome:
    """Result of an attack: a student, and its answers (N, K) to the validation images."""

    student: nn.Module | None
    validation: Tensor
    fit: Fit
    oracle: Oracle
    diverged: str = ""


@dataclass(frozen=True)
class TrialJob(Job):
    """One setting of an attack that is tried for a share of the epochs; nothing of it sees the test images.

    Its budget buys the images that the first measured student has.
    """

    epochs_share: float = 1.0

    kind = Trial

    @property
    def schedule(self) -> Recipe:
        return self.recipe.model_copy(update={"epochs": max(round(self.epochs_share * self.recipe.epochs), 1)})

    @property
    def _buyer(self) -> int:
        return self.pair.seeds[0]

    def _result(self, outcome: Outcome) -> Result:
        pair, logits = self.pair, outcome.validation
        samples, judged_by_answers = pair.attackers.validation, self.attack.data != ThiefData.LABELLED
        score = accuracy = metrics.accuracy(logits, samples.labels)
        if judged_by_answers:
            score = metrics.fidelity(logits, pair.victims[self.side].plain(samples, pair.data.num_classes))
        return Trial(
            side=self.side,
            attack=str(self.attack),
            listed=self.listed,
            student=str(self.student),
            seed=self.seed,
            recipe=str(self.schedule),
            score=0.0 if outcome.diverged else score,
            validation=0.0 if outcome.diverged else accuracy,
            queries=outcome.oracle.ledger.billed,
            images=len(samples),
            granted=len(samples) if judged_by_answers else 0,
            seconds=outcome.fit.seconds,
            diverged=outcome.diverged,
        )


def relisted(result: Result, job: Job) -> Result:
    """The result of `job`, which may be that of another: one that was tuned to the same setting, of a side that is the
    same network, or of another victim that was not asked."""
    changes: dict[str, object] = {"listed": job.listed, "side": job.side}
    if job.side == "none" and isinstance(result, Cell):
        predictions = torch.from_numpy(predicted(result.predictions, job.pair.data.num_classes))
        changes["fidelity"] = metrics.accuracy(job.pair.test_logits("victim"), predictions)
    return result.model_copy(update=changes)


def read_result(file: Path, job: Job) -> Result | None:
    """The result of `job`; None if it is not there, damaged, edited or another's, so that it is done again."""
    if not file.exists():
        return None
    try:
        found = job.kind.model_validate(unseal(read_json(file) or {}))
    except ValidationError:
        found = None
    if found and (str(job.attack), str(job.student), job.seed) == (found.attack, found.student, found.seed):
        return found
    log.warning("%s is damaged or was edited; that cell is done again.", file)
    return None


def late_gain(history: Sequence[dict[str, float]]) -> float:
    """Validation accuracy gained in the last fifth of the epochs, each end averaged over a tenth of them."""
    epochs = [row["epoch"] for row in history]
    begins = max((number for number in range(1, len(epochs)) if epochs[number] <= epochs[number - 1]), default=0)
    history = history[begins:]  # an attack may train several networks, of which the last is measured
    width = max(len(history) // 10, 1)
    if len(history) < 3 * width:
        return 0.0
    late = [epoch["validation_accuracy"] for epoch in history]
    start = len(late) - len(late) // 5
    return statistics.fmean(late[-width:]) - statistics.fmean(late[start - width : start])
