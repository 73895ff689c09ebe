"""Every flag, on a sound report that is made to lie in one way."""

import pytest

from undistill.auditing.flags import CHECKS, raised
from undistill.auditing.schema import ClassLoss, Interval, Report

# What to change in a sound report so that each flag must fire.
LIES = {
    "diverged": lambda r: cells_with(r, diverged="the term 'soft' is NaN"),
    "selected_on_test": lambda r: r.model_copy(update={"data": f"Leaky(of={r.data!r})"}),
    "few_seeds": lambda r: r.model_copy(update={"verdict": verdict_with(r, kd_gain=1)}),
    "one_teacher": lambda r: r.model_copy(update={"pairs": r.pairs[:1]}),
    "no_gain_from_honest": lambda r: r.model_copy(update={"verdict": verdict_with(r, kd_gain_honest=-0.05)}),
    "not_tuned": lambda r: r.model_copy(update={"trials": r.trials[: len(r.trials) // 2]}),
    "few_validation_images": lambda r: trials_with(r, images=100),
    "not_tried": lambda r: r.model_copy(update={"skipped": {"Skeptical() with ConvNet(width=2)": "It has one stage."}}),
    "labels_suffice": lambda r: r.model_copy(update={"verdict": verdict_with(r, leak_hard=0.0)}),
    "zeros_in_answers": lambda r: pairs_with(r, zeros=0.3),
    "no_twin": lambda r: r.model_copy(update={"honest": None}),
    "costly": lambda r: r.model_copy(update={"verdict": verdict_with(r, cost=0.1)}),
    "miscalibrated": lambda r: r.model_copy(update={"costs": r.costs.model_copy(update={"ece": 0.05})}),
    "a_class_pays": lambda r: pairs_with(
        r, worst_class=ClassLoss(name="0", lost=Interval(mean=0.5, low=0.4, high=0.6, n=40))
    ),
    "top_answers_flip": lambda r: pairs_with(r, flips=0.1),
    "price_not_kept": lambda r: pairs_with(
        r.model_copy(update={"verdict": verdict_with(r, cost=0.01)}), price=0.5, validation_cost=None
    ),
    "price_beyond_validation": lambda r: pairs_with(
        r, price=0.5, validation_cost=Interval(mean=0, low=-0.05, high=0.05, n=100)
    ),
    "barely_diverged": lambda r: r.model_copy(update={"divergence": 0.2}),
    "underfitted_teacher": lambda r: pairs_with(r, honest_train_accuracy=0.9),
    "students_still_learning": lambda r: cells_with(r, late_gain=0.1),
    "student_at_chance": lambda r: cells_with(r, accuracy=1 / 3),
    "adopted_weights": lambda r: pairs_with(r, adopted_weights=True),
    "stripped_with_the_weights": lambda r: pairs_with(r, responses=["TopK(k=1)"]),
    "answers_vary": lambda r: pairs_with(r, answers_vary=True),
    "another_twin": lambda r: pairs_with(r, same_origin=False),
    "small_test_set": lambda r: pairs_with(r, test_images=100),
}


def verdict_with(report: Report, **change: float):
    name, value = next(iter(change.items()))
    interval = getattr(report.verdict, name)
    new = {"n": value} if name == "kd_gain" else {"mean": value, "low": value, "high": value}
    return report.verdict.model_copy(update={name: interval.model_copy(update=new)})


def pairs_with(report: Report, **change: float) -> Report:
    return report.model_copy(update={"pairs": [pair.model_copy(update=change) for pair in report.pairs]})


def cells_with(report: Report, **change: float) -> Report:
    return report.model_copy(update={"cells": [cell.model_copy(update=change) for cell in report.cells]})


def trials_with(report: Report, **change: float) -> Report:
    return report.model_copy(update={"trials": [trial.model_copy(update=change) for trial in report.trials]})


@pytest.fixture
def sound(report: Report) -> Report:
    """A report on which no flag is raised."""
    good = report.model_copy(update={"divergence": 9.0, "pairs": report.pairs * 3, "trials": report.trials * 2})
    good = pairs_with(
        cells_with(trials_with(good, images=1000), late_gain=0.0, accuracy=0.9),
        test_images=1000,
        honest_train_accuracy=1.0,
    )
    verdict = verdict_with(good, kd_gain=3)
    good = good.model_copy(update={"verdict": verdict})
    good = good.model_copy(update={"verdict": verdict_with(good, kd_gain_honest=0.01)})
    good = good.model_copy(update={"verdict": verdict_with(good, cost=0.0)})
    good = good.model_copy(update={"verdict": verdict_with(good, leak_hard=0.1)})
    good = good.model_copy(update={"costs": good.costs.model_copy(update={"ece": 0.0})})
    good = pairs_with(good, worst_class=None)
    assert not raised(good)
    return good


@pytest.mark.parametrize("name", CHECKS)
def test_every_flag_fires_alone_on_its_lie(name: str, sound: Report) -> None:
    assert [flag.name for flag in raised(LIES[name](sound))] == [name]
