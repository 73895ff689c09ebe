"""`audit`: attack x student x seed against the victim and, as positive control, its honest twin."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from undistill import distributed, measure
from undistill.answers import REMEMBER
from undistill.attacks import Attack
from undistill.cells import Job
from undistill.data import Data, Samples, Source
from undistill.errors import SpecError
from undistill.flags import raised
from undistill.launch import Launcher
from undistill.measure import evaluate
from undistill.models import Model
from undistill.oracle import Access
from undistill.progress import Progress
from undistill.recipe import Recipe
from undistill.report.evidence import read_curve, write_evidence
from undistill.report.figures import label
from undistill.report.page import write_report
from undistill.report.schema import Cell, Costs, Interval, Pair, Report, Side, Teacher
from undistill.store import Run, claim, environment
from undistill.subject import Asking, Subject
from undistill.suites import find_suite
from undistill.verdict import interval, judge
from undistill.workflow import pick_device, recorded_settings

MOST_SEEDS = 1000
SIDES: tuple[Side, Side] = ("victim", "honest")


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
    launcher = Launcher.named(launcher)
    subject = Subject.of(victim, honest, range(seeds), model)
    recipe = recipe or recorded_settings(subject.honest).recipe
    subject = replace(subject, asking=Asking(pick_device(device), recipe.engine, remember))
    jobs = list(plan([subject], suite, attacks, students, recipe))
    for job in jobs:  # what cannot be loaded, or attacked, is said before work is done
        job.attack.check(job.subject.network(job.side))
    subject.require_finite()
    with claim(Path(out), {"command": "audit", "victim": subject.victim.digest, "honest": subject.honest.digest}):
        return perform(jobs, Path(out), suite, launcher, progress or Progress.silent())


def perform(jobs: Sequence[Job], out: Path, suite: str, launcher: Launcher, progress: Progress) -> Report:
    """Do what is not done yet, then write one report over all cells."""
    cells = launcher.run(jobs, out / "cells", progress)
    subjects = list(dict.fromkeys(job.subject for job in jobs))
    report = summarise(subjects, cells, suite, jobs[0].recipe)
    first = subjects[0]
    sheets: dict[str, Path] = {}
    for job in jobs:
        if (sheet := job.sheet(out / "cells")).exists():
            sheets.setdefault(label(job.column), sheet)
    curves = {"unprotected": read_curve(first.honest), "protected": read_curve(first.victim)}
    write_evidence(out / "evidence.npz", first.data, first.network("honest"), first.network("victim"), sheets, curves)
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
        environment=environment(subjects[0].asking.device),
    )
    return report.model_copy(update={"flags": raised(report)})


def measure_pair(subject: Subject) -> Pair:
    data, answers = subject.data, test_logits(subject)
    train = subject.answers["honest"].plain(data.train, data.num_classes)
    victim, honest = (subject.answers[side].plain(data.validation, data.num_classes) for side in SIDES)
    parent = subject.victim.record.get("parent")
    made_from = parent["weights_sha256"] if parent else subject.honest.digest
    return Pair(
        victim=measure_teacher(subject.victim, answers["victim"], data),
        honest=measure_teacher(subject.honest, answers["honest"], data),
        agreement=measure.fidelity(answers["victim"], answers["honest"]),
        divergence=measure.divergence(victim, honest),
        honest_train_accuracy=measure.accuracy(train, data.train.labels),
        test_images=len(data.test),
        adopted_weights=bool(subject.honest.record.get("start_sha256")),
        same_origin=made_from == subject.honest.digest,
    )


def test_logits(subject: Subject) -> dict[Side, Tensor]:
    return {side: subject.test_logits(side) for side in SIDES}


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
    answers, labels = test_logits(subjects[0]), subjects[0].data.test.labels
    lost = (answers["honest"].argmax(1) == labels).double() - (answers["victim"].argmax(1) == labels).double()
    return interval(lost.tolist())


def measure_costs(subjects: Sequence[Subject], pairs: Sequence[Pair]) -> Costs:
    def mean(values: Iterator[float]) -> float:
        return statistics.fmean(list(values))

    return Costs(
        accuracy_lost=mean(pair.honest.accuracy - pair.victim.accuracy for pair in pairs),
        nll=mean(pair.victim.nll - pair.honest.nll for pair in pairs),
        ece=mean(pair.victim.ece - pair.honest.ece for pair in pairs),
        l1=mean(measure.l1(s.test_logits("victim"), s.test_logits("honest")) for s in subjects),
        ms_per_query_victim=mean(ms_per_query(s.network("victim"), s.data) for s in subjects),
        ms_per_query_honest=mean(ms_per_query(s.network("honest"), s.data) for s in subjects),
        train_seconds=mean(float(s.victim.record["seconds"]) for s in subjects),
    )


def ms_per_query(network: nn.Module, data: Data, repeats: int = 3) -> float:
    """Median milliseconds for one image, answered in batches."""
    times = []
    some = data.test[torch.arange(min(512, len(data.test)))]
    images = Samples(some.pixels, some.labels)
    for _ in range(repeats):
        began = time.perf_counter()
        evaluate(network, images)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / len(images) * 1000
