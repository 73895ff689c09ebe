"""Measurements of a victim and its honest twin themselves, on the test images."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from undistill.auditing.pair import VictimPair
from undistill.auditing.schema import ClassLoss, Costs, Interval, Pair, Reached, Side, Teacher
from undistill.auditing.statistics import interval, least_spread, paired_interval
from undistill.core.unshown import LOG_ZERO
from undistill.data.split import Data, Samples
from undistill.runs.contact import Contact
from undistill.runs.folder import OnRecord
from undistill.runs.run import Run
from undistill.training import metrics
from undistill.training.metrics import evaluate
from undistill.victims.victim import NetworkVictim

SIDES: tuple[Side, Side] = ("victim", "honest")


def measure_pair(pair: VictimPair) -> Pair:
    """A victim on the test images, beside its honest twin where one is known."""
    data, victim, record = pair.data, pair.victims["victim"], pair.victim.record
    beside = _beside_twin(pair, pair.honest) if pair.honest else WITHOUT_TWIN
    return Pair(
        victim=measure_teacher(pair.victim, pair.asked("victim"), data),
        test_images=len(data.test),
        adopted_weights=(pair.honest or pair.victim).has_history,
        unseen=(pair.honest or pair.victim).record.get("unseen") == "test",
        answers_vary=not victim.repeatable,
        self_agreement=metrics.self_agreement(pair.asked("victim")),
        zeros=zeros(pair),
        responses=record.get("responses", []),
        calibrated_on=record.get("calibrated_on", {}),
        bits=victim.bits,
        form=victim.form.name.lower(),
        flips=flips(pair),
        reached=_reached(pair.victim),
        price=record.get("price"),
        found=record.get("found", {}),
        victim_sha256=pair.victim.digest,
        identity=pair.victim.identity,
        data_sha256=record["data_sha256"],
        **beside,
    )


def _reached(victim: Run | Contact) -> Reached | None:
    if not isinstance(victim, Contact):
        return None
    bought, found = victim.purchases, victim.known
    return Reached(
        spec=victim.record["model"],
        output=found.kind,
        form=found.form.name.lower(),
        bought=bought.distinct,
        billed=bought.billed,
        lost=bought.number("lost"),
    )


WITHOUT_TWIN: Mapping[str, Any] = dict.fromkeys(("honest", "divergence", "agreement", "honest_train_accuracy")) | {
    "same_origin": True
}


def _beside_twin(pair: VictimPair, honest: Run) -> Mapping[str, Any]:
    """Fields of a `Pair` that compare the victim with its twin."""
    data, logits = pair.data, {side: pair.test_logits(side) for side in SIDES}
    train = pair.victims["honest"].plain(data.train, data.num_classes)
    victim, twin = (pair.victims[side].plain(data.validation, data.num_classes) for side in SIDES)
    parent = pair.victim.record.get("parent")
    return {
        "honest": measure_teacher(honest, pair.asked("honest"), data),
        "agreement": metrics.fidelity(*logits.values()),
        "divergence": metrics.divergence(victim, twin),
        "honest_train_accuracy": metrics.accuracy(train, data.train.labels),
        "membership_gap": metrics.confidence(train) - metrics.confidence(logits["honest"]),
        "same_origin": (parent["weights_sha256"] if parent else honest.digest) == honest.digest,
        "validation_cost": validation_cost(pair),
        "worst_class": worst_class(pair),
        "honest_sha256": honest.digest,
    }


def flips(pair: VictimPair) -> float:
    """Share of test images to which the victim's responses give another top answer than its network does."""
    victim = pair.victims["victim"]
    if not isinstance(victim, NetworkVictim) or victim.bare is victim.network:
        return 0.0
    return 1 - metrics.fidelity(pair.test_logits("victim"), evaluate(victim.bare, pair.data.test).cpu())


def zeros(pair: VictimPair) -> float:
    """Share of the probabilities that the victim shows for test images, and that are 0."""
    test = pair.data.test
    some = Samples(test.images, test.labels)[torch.arange(min(512, len(test)))]
    answer = pair.victims["victim"].answer_samples(some, pair.data.num_classes)
    return float(((answer.log_p <= LOG_ZERO) & answer.shown).sum() / answer.shown.sum())


def measure_teacher(run: OnRecord, asked: Sequence[Tensor], data: Data) -> Teacher:
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
    honest, victim = (pair.victims[side].plain(samples, classes).argmax(1) for side in ("honest", "victim"))
    right = [(top == samples.labels).double() for top in (honest, victim)]
    return paired_interval((right[0] - right[1]).tolist())


def accuracy_cost(pairs: Sequence[VictimPair], measured: Sequence[Pair]) -> Interval | None:
    """Accuracy lost by protecting, with its spread over pairs, or for a single pair over the test images.

    None where no twin is known, as for `measure_costs`.
    """
    lost = [pair.honest.accuracy - pair.victim.accuracy for pair in measured if pair.honest]
    if len(lost) > 1:
        return interval(lost, least_spread(len(pairs[0].data.test)))
    return paired_interval((_rights(pairs[0], "honest") - _rights(pairs[0], "victim")).tolist()) if lost else None


def measure_costs(pairs: Sequence[VictimPair], measured: Sequence[Pair]) -> Costs | None:
    """Costs of protecting, as means over pairs."""
    both = [(pair.victim, pair.honest) for pair in measured if pair.honest]
    if not both:
        return None

    def more(name: str) -> float:
        """By how much a measurement of the victim is above that of its twin."""
        return statistics.fmean(getattr(victim, name) - getattr(honest, name) for victim, honest in both)

    return Costs(
        accuracy_lost=-more("accuracy"),
        nll=more("nll"),
        ece=more("ece"),
        brier=more("brier"),
        top5=-more("top5"),
        selective=-more("selective"),
        l1=statistics.fmean(metrics.l1(pair.test_logits("victim"), pair.test_logits("honest")) for pair in pairs),
        ms_per_query_victim=_mean_ms(pairs, "victim"),
        ms_per_query_honest=_mean_ms(pairs, "honest"),
        train_seconds=statistics.fmean(float(pair.victim.record["seconds"]) for pair in pairs),
    )


def _mean_ms(pairs: Sequence[VictimPair], side: Side) -> float | None:
    networks = [(network, pair.data) for pair in pairs if (network := pair.network(side)) is not None]
    return statistics.fmean(ms_per_query(*one) for one in networks) if networks else None


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
