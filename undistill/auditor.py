"""`audit`: attack x student x seed against the victim and, as positive control, its honest twin."""

import hashlib
import json
import logging
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

import undistill
from undistill import measure
from undistill.attacks import Attack
from undistill.data import Data, Source
from undistill.errors import SpecError, StoreError
from undistill.files import write_json
from undistill.fit import Fit, Recipe
from undistill.flags import raised
from undistill.measure import evaluate
from undistill.models import Model, returned, seeded
from undistill.oracle import Access, Oracle
from undistill.progress import Progress
from undistill.report.evidence import write_evidence
from undistill.report.page import write_report
from undistill.report.schema import Cell, Costs, Interval, Pair, Report, Side, Teacher
from undistill.seeds import derive
from undistill.store import Run, claim, environment
from undistill.suites import find_suite
from undistill.verdict import interval, judge
from undistill.workflow import divergence, pick_device, recorded_settings

log = logging.getLogger(__name__)

VALIDATION_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Subject:
    """A victim beside its honest twin, and the seeds with which students attack this pair."""

    victim: Run
    honest: Run
    seeds: tuple[int, ...]
    model: Model | None = None

    def __post_init__(self) -> None:
        if self.victim.record["data_sha256"] != self.honest.record["data_sha256"]:
            raise StoreError(
                f"{self.victim.folder} and {self.honest.folder} were made on different data; an audit needs one."
            )

    @classmethod
    def of(
        cls, victim: str | Path | Run, honest: str | Path | Run | None, seeds: Sequence[int], model: str | Model | None
    ) -> "Subject":
        """`honest` defaults to the run from which the victim was protected."""
        run = victim if isinstance(victim, Run) else Run.open(victim)
        honest = honest or parent(run)
        twin = honest if isinstance(honest, Run) else Run.open(honest)
        return cls(run, twin, tuple(seeds), None if model is None else Model.named(model))

    @cached_property
    def data(self) -> Data:
        return self.victim.data()

    @cached_property
    def victim_network(self) -> nn.Module:
        return self.victim.network(self.model)

    @cached_property
    def honest_network(self) -> nn.Module:
        return self.honest.network(self.model)

    @cached_property
    def answers(self) -> dict[Side, Tensor]:
        """Logits of both sides for the test images; where no one is asked, the victim's count."""
        images = self.data.test.images
        victim = evaluate(self.victim_network, images)
        return {"victim": victim, "honest": evaluate(self.honest_network, images), "none": victim}


def parent(run: Run) -> Path:
    """The folder of the honest teacher from which `run` was protected."""
    if "parent" not in run.record:
        raise StoreError(
            f"{run.folder} was not made by 'protect', so its honest twin is unknown: name it with --honest RUN."
        )
    folder = run.folder / str(run.record["parent"]["folder"])
    if not folder.is_dir() or Run.open(folder).digest != run.record["parent"]["weights_sha256"]:
        raise StoreError(f"The honest twin of {run.folder} is no longer at {folder}; name it with --honest RUN.")
    return folder


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
        """Names what the cell's result depends on: weights, data, specs, seed, version."""
        asked = {
            "victim": self.subject.victim.digest,
            "honest": self.subject.honest.digest,
            "none": self.subject.victim.digest,
        }
        parts = [asked[self.side], self.subject.victim.record["data_sha256"], self.side, str(self.attack)]
        parts += [str(self.student), self.seed, str(self.recipe), undistill.__version__]
        refers = [spec.refers() for spec in (self.attack, self.student, self.subject.model) if spec]
        parts += [sorted(names.values()) for names in refers if names]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def run(self, cells: Path, device: torch.device, progress: Progress) -> Cell:
        """The cell from its file, or trained and written there; a stopped training goes on."""
        file, folder = cells / f"{self.key}.json", cells / self.key
        if cell := read_cell(file):
            return cell
        folder.mkdir(parents=True, exist_ok=True)
        cell = self._train(folder, device, progress)
        write_json(file, cell.model_dump())
        shutil.rmtree(folder)
        return cell

    def _train(self, folder: Path, device: torch.device, progress: Progress) -> Cell:
        subject, data = self.subject, self.subject.data
        network = subject.honest_network if self.side == "honest" else subject.victim_network
        oracle = Oracle(network.to(device), self.attack.needs)
        seed = derive(self.seed, "student")
        student = self.student.build(data.shape, data.num_classes, seed)
        name = f"{type(self.attack).__name__} on {self.side}, seed {self.seed}"
        fit = Fit(self.recipe, seed, device, folder, progress, name, carried=(oracle,))
        share = max(VALIDATION_SHARE, data.num_classes / len(data.train))
        attackers = data.attackers(share, derive(self.seed, "attacker"))
        with seeded(derive(self.seed, "attack")):
            student = returned(self.attack.run(oracle, student, attackers, fit), self.attack).cpu()
        network.cpu()
        logits = evaluate(student, data.test.images)
        return Cell(
            side=self.side,
            attack=str(self.attack),
            student=str(self.student),
            seed=self.seed,
            accuracy=measure.accuracy(logits, data.test.labels),
            fidelity=measure.fidelity(logits, subject.answers[self.side]),
            queries=oracle.queries,
            seconds=fit.seconds,
            floor=self.attack.floor,
            late_gain=late_gain(fit.history),
        )


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
    progress: Progress | None = None,
) -> Report:
    """Audit one victim; writes report.json, report.html and report.md into `out`.

    `attacks` are added to the suite's; `students` replace its students. `recipe` is how students
    are trained, by default as the honest teacher was. Cells that `out` already holds are not done again.
    """
    if seeds < 1:
        raise SpecError(f"An audit needs at least one seed; seeds = {seeds}.")
    subject = Subject.of(victim, honest, range(seeds), model)
    recipe = recipe or recorded_settings(subject.honest).recipe
    jobs = list(plan([subject], suite, attacks, students, recipe))
    chosen = pick_device(device)
    _ = subject.victim_network, subject.honest_network  # what cannot be loaded is said before work is done
    with claim(Path(out), {"command": "audit", "victim": subject.victim.digest, "honest": subject.honest.digest}):
        return perform(jobs, Path(out), suite, chosen, progress or Progress.silent())


def perform(jobs: Sequence[Job], out: Path, suite: str, device: torch.device, progress: Progress) -> Report:
    """Do what is not done yet, then write one report over all cells."""
    with progress.task("audit", len(jobs)) as task:
        cells = []
        for job in jobs:
            cells.append(job.run(out / "cells", device, progress))
            task.advance()
    subjects = list(dict.fromkeys(job.subject for job in jobs))
    report = summarise(subjects, cells, suite, jobs[0].recipe)
    write_evidence(out / "evidence.npz", subjects[0].data, subjects[0].honest_network, subjects[0].victim_network)
    write_report(report, out)
    return report


def plan(
    subjects: Sequence[Subject],
    suite: str,
    attacks: Sequence[str | Attack],
    students: Sequence[str | Model],
    recipe: Recipe,
) -> Iterator[Job]:
    """Every cell of the audit; an attack that asks nobody runs once for both sides."""
    chosen = find_suite(suite)
    parsed = dict.fromkeys(Attack.named(attack) for attack in [*chosen.attacks, *attacks])
    networks = dict.fromkeys(Model.named(student) for student in students or chosen.students)
    for subject in subjects:
        for seed in subject.seeds:
            for student in networks:
                for attack in parsed:
                    sides: tuple[Side, ...] = ("none",) if attack.needs == Access.NONE else ("victim", "honest")
                    for side in sides:
                        yield Job(subject, side, attack, student, seed, recipe)


def summarise(subjects: Sequence[Subject], cells: Sequence[Cell], suite: str, recipe: Recipe) -> Report:
    """The report of finished cells; flags are raised on what it says."""
    pairs = [measure_pair(subject) for subject in subjects]
    costs = measure_costs(subjects, pairs)
    first = subjects[0].victim.record
    report = Report(
        title=f"Audit of {first.get('defence', 'an unprotected model')}",
        data=first["data"],
        classes=len(first["classes"]),
        suite=suite,
        recipe=str(recipe),
        victim=average([pair.victim for pair in pairs]),
        honest=average([pair.honest for pair in pairs]),
        pairs=pairs,
        cells=list(cells),
        divergence=statistics.fmean(pair.divergence for pair in pairs),
        costs=costs,
        verdict=judge(cells, accuracy_cost(subjects, pairs), Source.parse(first["data"]).title),
        flags=[],
        environment=environment(),
    )
    return report.model_copy(update={"flags": raised(report)})


def measure_pair(subject: Subject) -> Pair:
    data, answers = subject.data, subject.answers
    train = evaluate(subject.honest_network, data.train.images)
    made_from = subject.victim.record.get("parent", {}).get("weights_sha256", subject.honest.digest)
    return Pair(
        victim=measure_teacher(subject.victim, answers["victim"], data),
        honest=measure_teacher(subject.honest, answers["honest"], data),
        agreement=measure.fidelity(answers["victim"], answers["honest"]),
        divergence=divergence(subject.victim_network, subject.honest_network, data),
        honest_train_accuracy=measure.accuracy(train, data.train.labels),
        test_images=len(data.test),
        adopted_weights=bool(subject.honest.record.get("start_sha256")),
        same_origin=made_from == subject.honest.digest,
    )


def measure_teacher(run: Run, logits: Tensor, data: Data) -> Teacher:
    labels = data.test.labels
    return Teacher(
        spec=f"{run.record['model']} {run.record.get('defence', '')}".strip(),
        accuracy=measure.accuracy(logits, labels),
        nll=measure.nll(logits, labels),
        ece=measure.ece(logits, labels),
    )


def average(teachers: Sequence[Teacher]) -> Teacher:
    means = {
        name: statistics.fmean(getattr(teacher, name) for teacher in teachers) for name in ("accuracy", "nll", "ece")
    }
    return Teacher(spec=teachers[0].spec, **means)


def accuracy_cost(subjects: Sequence[Subject], pairs: Sequence[Pair]) -> Interval:
    """Accuracy lost: spread over pairs; for a single pair, over the test images (paired)."""
    if len(pairs) > 1:
        return interval([pair.honest.accuracy - pair.victim.accuracy for pair in pairs])
    answers, labels = subjects[0].answers, subjects[0].data.test.labels
    lost = (answers["honest"].argmax(1) == labels).double() - (answers["victim"].argmax(1) == labels).double()
    return interval(lost.tolist())


def measure_costs(subjects: Sequence[Subject], pairs: Sequence[Pair]) -> Costs:
    def mean(values: Iterator[float]) -> float:
        return statistics.fmean(list(values))

    return Costs(
        accuracy_lost=mean(pair.honest.accuracy - pair.victim.accuracy for pair in pairs),
        nll=mean(pair.victim.nll - pair.honest.nll for pair in pairs),
        ece=mean(pair.victim.ece - pair.honest.ece for pair in pairs),
        l1=mean(measure.l1(s.answers["victim"], s.answers["honest"]) for s in subjects),
        ms_per_query_victim=mean(ms_per_query(s.victim_network, s.data) for s in subjects),
        ms_per_query_honest=mean(ms_per_query(s.honest_network, s.data) for s in subjects),
        train_seconds=mean(float(s.victim.record["seconds"]) for s in subjects),
    )


def ms_per_query(network: nn.Module, data: Data, repeats: int = 3) -> float:
    """Median milliseconds for one image, answered in batches."""
    times = []
    images = data.test.images[:512]
    for _ in range(repeats):
        began = time.perf_counter()
        evaluate(network, images)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / len(images) * 1000


def read_cell(file: Path) -> Cell | None:
    """The finished cell, or None if it is not there or damaged, in which case it is done again."""
    try:
        return Cell.model_validate_json(file.read_text()) if file.exists() else None
    except ValueError:
        log.warning("%s is damaged; that cell is done again.", file)
        return None


def late_gain(history: Sequence[dict[str, float]]) -> float:
    """Validation accuracy gained in the last fifth of the epochs, each end averaged over a tenth of them."""
    width = max(len(history) // 10, 1)
    if len(history) < 3 * width:
        return 0.0
    late = [epoch["validation_accuracy"] for epoch in history]
    start = len(late) - len(late) // 5
    return statistics.fmean(late[-width:]) - statistics.fmean(late[start - width : start])
