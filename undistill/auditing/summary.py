"""The report over finished cells: both networks measured, costs, verdict, flags."""

import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from undistill.auditing.flags import raised
from undistill.auditing.pair import VictimPair
from undistill.auditing.plan import Plan
from undistill.auditing.schema import Cell, ClassLoss, Costs, Interval, Pair, Report, Side, Teacher, Trial
from undistill.auditing.statistics import interval, least_spread, paired_interval
from undistill.auditing.tuning import proposals
from undistill.auditing.verdict import Judge
from undistill.core.unshown import LOG_ZERO
from undistill.data.source import Source
from undistill.data.split import Data, Samples
from undistill.runs.environment import environment
from undistill.runs.run import Run
from undistill.training import metrics
from undistill.training.metrics import evaluate
from undistill.victims.protected import Protected

SIDES: tuple[Side, Side] = ("victim", "honest")


def judge_of(pairs: Sequence[VictimPair], cells: Sequence[Cell], trials: Sequence[Trial]) -> Judge:
    """The judge of finished cells; he compares image by image where all pairs have the same test images."""
    test = pairs[0].data.test
    same = len({pair.data.test.digest for pair in pairs}) == 1
    return Judge(cells, trials, len(test), pairs[0].data.num_classes, test.labels.numpy() if same else None)


def summarise(pairs: Sequence[VictimPair], judge: Judge, plan: Plan, *, made: str, by: str) -> Report:
    """The report over finished cells, with the flags that apply to it, `made` on a date `by` somebody."""
    measured = [measure_pair(pair) for pair in pairs]
    first = pairs[0].victim.record
    protection = ", ".join(first.get("defences", ())) or "an unprotected model"
    report = Report(
        title=f"Audit of {protection}",
        by=by,
        made=made,
        data=first["data"],
        classes=len(first["classes"]),
        class_names=first["classes"],
        suite=plan.suite,
        tuning=str(plan.tuning),
        searched_by=proposals({}, 0).name if len(judge.trials) > len(plan.searched) else "",
        skipped=dict(plan.skipped),
        recipe=str(plan.jobs[0].recipe),
        victim=average([pair.victim for pair in measured]),
        honest=average([pair.honest for pair in measured]),
        pairs=measured,
        cells=[cell.model_copy(update={"predictions": ""}) for cell in judge.cells],
        trials=list(judge.trials),
        divergence=statistics.fmean(pair.divergence for pair in measured),
        costs=measure_costs(pairs, measured),
        verdict=judge.verdict(accuracy_cost(pairs, measured), Source.parse(first["data"]).title, most_bits(measured)),
        flags=[],
        environment=environment(pairs[0].options.device),
    )
    return report.model_copy(update={"flags": raised(report)})


def most_bits(pairs: Sequence[Pair]) -> float | None:
    """The bound that holds for every victim; None where one has none."""
    bounds = [pair.bits for pair in pairs]
    return None if None in bounds else max(bound for bound in bounds if bound is not None)


def measure_pair(pair: VictimPair) -> Pair:
    """A victim and its honest twin on the test, validation and training images."""
    data, logits = pair.data, {side: pair.test_logits(side) for side in SIDES}
    train = pair.victims["honest"].answers.plain(data.train, data.num_classes)
    victim, honest = (pair.victims[side].answers.plain(data.validation, data.num_classes) for side in SIDES)
    parent = pair.victim.record.get("parent")
    made_from = parent["weights_sha256"] if parent else pair.honest.digest
    return Pair(
        victim=measure_teacher(pair.victim, pair.asked("victim"), data),
        honest=measure_teacher(pair.honest, pair.asked("honest"), data),
        agreement=metrics.fidelity(logits["victim"], logits["honest"]),
        divergence=metrics.divergence(victim, honest),
        honest_train_accuracy=metrics.accuracy(train, data.train.labels),
        test_images=len(data.test),
        adopted_weights=pair.honest.has_history,
        answers_vary=not pair.victims["victim"].repeatable,
        self_agreement=metrics.self_agreement(pair.asked("victim")),
        zeros=zeros(pair),
        unseen=pair.honest.record.get("unseen") == "test",
        membership_gap=metrics.confidence(train) - metrics.confidence(logits["honest"]),
        same_origin=made_from == pair.honest.digest,
        responses=pair.victim.record.get("responses", []),
        calibrated_on=pair.victim.record.get("calibrated_on", {}),
        bits=pair.network("victim").bits if isinstance(pair.network("victim"), Protected) else None,
        flips=flips(pair),
        price=pair.victim.record.get("price"),
        validation_cost=validation_cost(pair),
        found=pair.victim.record.get("found", {}),
        worst_class=worst_class(pair),
        victim_sha256=pair.victim.digest,
        honest_sha256=pair.honest.digest,
        data_sha256=pair.victim.record["data_sha256"],
    )


def flips(pair: VictimPair) -> float:
    """Share of test images to which the victim's responses give another top answer than its network does."""
    victim = pair.victims["victim"]
    if victim.bare is victim.network:
        return 0.0
    return 1 - metrics.fidelity(pair.test_logits("victim"), evaluate(victim.bare, pair.data.test).cpu())


def zeros(pair: VictimPair) -> float:
    """Share of the probabilities that the victim shows for test images, and that are 0."""
    test = pair.data.test
    some = Samples(test.images, test.labels)[torch.arange(min(512, len(test)))]
    answer = pair.victims["victim"].answer_samples(some, pair.data.num_classes)
    return float(((answer.log_p <= LOG_ZERO) & answer.shown).sum() / answer.shown.sum())


def measure_teacher(run: Run, asked: Sequence[Tensor], data: Data) -> Teacher:
    """A network on the test images, from its answers (N, K); means over them where it was asked several times."""
    labels = data.test.labels
    return Teacher(
        spec=" ".join([run.record["model"], *run.record.get("defences", ())]),
        accuracy=statistics.fmean(metrics.accuracy(logits, labels) for logits in asked),
        nll=statistics.fmean(metrics.nll(logits, labels) for logits in asked),
        ece=statistics.fmean(metrics.ece(logits, labels) for logits in asked),
        brier=statistics.fmean(metrics.brier(logits, labels) for logits in asked),
        top5=statistics.fmean(metrics.top_k(logits, labels) for logits in asked),
        selective=statistics.fmean(metrics.selective_accuracy(logits, labels) for logits in asked),
        by_class=means_by_class([metrics.class_accuracies(logits, labels) for logits in asked]),
    )


def average(teachers: Sequence[Teacher]) -> Teacher:
    """Means over networks that were made in the same way with different seeds."""
    names = ("accuracy", "nll", "ece", "brier", "top5", "selective")
    means = {name: statistics.fmean(getattr(teacher, name) for teacher in teachers) for name in names}
    by_class = means_by_class([teacher.by_class for teacher in teachers])
    return Teacher(spec=teachers[0].spec, by_class=by_class, **means)


def means_by_class(measured: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean of each class over several measurements; None where none of them has images of it."""
    found = [[value for value in values if value is not None] for values in zip(*measured, strict=True)]
    return [statistics.fmean(values) if values else None for values in found]


def worst_class(pair: VictimPair) -> ClassLoss:
    """The class of the test images on which the victim surely lost the most accuracy against its twin.

    Its interval is that of one among as many as there are classes (Bonferroni), so that it may be chosen by its end.
    """
    labels, data = pair.data.test.labels, pair.data
    lost = _rights(pair, "honest") - _rights(pair, "victim")
    present = [label for label in range(data.num_classes) if (labels == label).any()]
    found = {label: paired_interval(lost[labels == label].tolist(), among=len(present)) for label in present}

    def surely_lost(label: int) -> float:
        low = found[label].low
        return -1.0 if low is None else low

    worst = max(present, key=surely_lost)
    return ClassLoss(name=data.classes[worst], lost=found[worst])


def _rights(pair: VictimPair, side: Side) -> Tensor:
    """How often each test image is answered rightly, a share (N,)."""
    labels = pair.data.test.labels
    return torch.stack([(logits.argmax(1) == labels).double() for logits in pair.asked(side)]).mean(0)


def validation_cost(pair: VictimPair) -> Interval:
    """Accuracy lost on validation images: what the owner knew when he protected."""
    samples, classes = pair.data.validation, pair.data.num_classes
    honest, victim = (pair.victims[side].answers.plain(samples, classes).argmax(1) for side in ("honest", "victim"))
    right = [(top == samples.labels).double() for top in (honest, victim)]
    return paired_interval((right[0] - right[1]).tolist())


def accuracy_cost(pairs: Sequence[VictimPair], measured: Sequence[Pair]) -> Interval:
    """Accuracy lost by protecting, with its spread over pairs, or for a single pair over the test images."""
    if len(measured) > 1:
        lost = [pair.honest.accuracy - pair.victim.accuracy for pair in measured]
        return interval(lost, least_spread(len(pairs[0].data.test)))
    return paired_interval((_rights(pairs[0], "honest") - _rights(pairs[0], "victim")).tolist())


def measure_costs(pairs: Sequence[VictimPair], measured: Sequence[Pair]) -> Costs:
    """Costs of protecting, as means over pairs."""

    def mean(values: Iterator[float]) -> float:
        return statistics.fmean(list(values))

    return Costs(
        accuracy_lost=mean(pair.honest.accuracy - pair.victim.accuracy for pair in measured),
        nll=mean(pair.victim.nll - pair.honest.nll for pair in measured),
        ece=mean(pair.victim.ece - pair.honest.ece for pair in measured),
        brier=mean(_more(pair, "brier") for pair in measured),
        top5=mean(-_more(pair, "top5") for pair in measured),
        selective=mean(-_more(pair, "selective") for pair in measured),
        l1=mean(metrics.l1(pair.test_logits("victim"), pair.test_logits("honest")) for pair in pairs),
        ms_per_query_victim=mean(ms_per_query(pair.network("victim"), pair.data) for pair in pairs),
        ms_per_query_honest=mean(ms_per_query(pair.network("honest"), pair.data) for pair in pairs),
        train_seconds=mean(float(pair.victim.record["seconds"]) for pair in pairs),
    )


def _more(pair: Pair, name: str) -> float:
    """By how much a measurement of the victim is above that of its twin."""
    return float(getattr(pair.victim, name) - getattr(pair.honest, name))


def ms_per_query(network: nn.Module, data: Data, repeats: int = 3) -> float:
    """Median time to answer one test image in a batch of up to 512, in milliseconds."""
    times = []
    some = data.test[torch.arange(min(512, len(data.test)))]
    images = Samples(some.pixels, some.labels)
    for _ in range(repeats):
        began = time.perf_counter()
        evaluate(network, images)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / len(images) * 1000
