import math

import numpy as np
import pytest

from undistill.attacks.attack import FLOORS as FLOOR_ROLES
from undistill.attacks.attack import Role
from undistill.auditing.schema import Cell, Interval
from undistill.auditing.verdict import interval, judge, least_spread, minus, paired_interval
from undistill.auditing.wording import is_above_zero, price, quantile
from undistill.core.errors import SpecError

FLOORS = {"Scratch()": 0.80, "LabelSmoothing(smoothing=0.1)": 0.82, "HardLabels()": 0.85}
ROLES = {
    "Scratch": Role.NO_TEACHER,
    "LabelSmoothing": Role.LABELS,
    "HardLabels": Role.TOP_ANSWERS,
    "SoftLabels": Role.PLAIN,
}
COST = Interval(mean=0.01, low=0.0, high=0.02, n=3)


def cell(attack: str, side: str, accuracy: float, seed: int = 0, student: str = "ConvNet(width=2)") -> Cell:
    return Cell(
        side=side,  # type: ignore[arg-type]
        attack=attack,
        student=student,
        seed=seed,
        accuracy=accuracy,
        fidelity=accuracy,
        role=ROLES.get(attack.partition("(")[0], Role.OTHER),
        queries=100,
        distinct=100,
        seconds=1.0,
        late_gain=0.0,
        compute="",
    )


def cells(victim_kd: float = 0.70, honest_kd: float = 0.84, seeds: int = 3, **extra: float) -> list[Cell]:
    """Every seed shifts all students of that seed by the same amount."""
    found = []
    for seed in range(seeds):
        shift = 0.02 * seed
        found += [cell(name, "none", FLOORS[name] + shift, seed) for name in list(FLOORS)[:2]]
        found += [cell("HardLabels()", side, FLOORS["HardLabels()"] + shift, seed) for side in ("victim", "honest")]
        found.append(cell("SoftLabels(T=4, alpha=0.9)", "victim", victim_kd + shift, seed))
        found.append(cell("SoftLabels(T=4, alpha=0.9)", "honest", honest_kd + shift, seed))
        found += [cell(f"{name}()", "victim", accuracy + shift, seed) for name, accuracy in extra.items()]
    return found


def test_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.low is not None
    assert found.low == pytest.approx(2 - 4.302653 * 1 / 3**0.5)  # t quantile for 2 degrees of freedom
    single = interval([5.0])
    assert (single.mean, single.low, single.high, single.n) == (5.0, None, None, 1)


def test_differences_are_paired_by_seed() -> None:
    found = minus({0: 0.9, 1: 0.5}, {1: 0.4, 0: 0.8})
    assert found.mean == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


def test_verdict_by_hand() -> None:
    verdict = judge(cells(), COST, "toys", 10**9)
    assert verdict.leak_hard.mean == pytest.approx(0.70 - 0.85)
    assert verdict.leak_label_smoothing.mean == pytest.approx(0.70 - 0.82)
    assert verdict.kd_gain.mean == pytest.approx(0.70 - 0.80)
    assert verdict.kd_gain_honest.mean == pytest.approx(0.84 - 0.80)
    assert verdict.damage.mean == pytest.approx(0.84 - 0.70)
    assert verdict.leak_hard.high == pytest.approx(verdict.leak_hard.low)  # the shift of a seed cancels
    assert verdict.sentence == (
        "On toys, the best thief of 2 that were tried (copying only the top answers) gets a ConvNet(width=2) of 87.0%; "
        "no attack gains measurably over copying only the top answers. Plain distillation from the protected model "
        "gives a student 14.0 points worse than from the unprotected one. The protection costs between 0.0 and 2.0 "
        "points of accuracy."
    )


def test_worst_attack_decides() -> None:
    verdict = judge(cells(Clever=0.88), COST, "toys", 10**9)
    assert verdict.worst_attack == "Clever()"
    assert verdict.leak_hard.mean == pytest.approx(0.03)
    assert verdict.kd_gain.mean == pytest.approx(-0.10)  # the paper's figure is about plain KD alone
    assert "(Clever()) gets a ConvNet(width=2) of 90.0%; Clever() gains 3.0 points over" in verdict.sentence


def test_worst_student_decides() -> None:
    other = [c.model_copy(update={"student": "PlainCNN(width=32)", "accuracy": c.accuracy + 0.1}) for c in cells()]
    weak = cells(victim_kd=0.84)
    verdict = judge(weak + other, COST, "toys", 10**9)
    assert verdict.worst_student == "ConvNet(width=2)"
    assert verdict.damage.mean == pytest.approx(0.0)
    assert "a student not measurably worse than from the unprotected one" in verdict.sentence


def test_missing_cells_are_named() -> None:
    with pytest.raises(SpecError, match="no attack of the role 'top answers' on side 'victim'"):
        judge([c for c in cells() if not c.attack.startswith("Hard")], COST, "toys", 10**9)
    with pytest.raises(SpecError, match="no attack beside the floors"):
        judge([c for c in cells() if c.role in FLOOR_ROLES], COST, "toys", 10**9)


def test_single_seed_has_no_interval() -> None:
    verdict = judge(cells(seeds=1, Clever=0.99), COST, "toys", 10**9)
    assert verdict.damage.low is None
    assert "With one student of each kind that is no claim" in verdict.sentence
    assert not any(claim in verdict.sentence for claim in ("worse", "gains"))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.004, 0.005, "costs no accuracy (less than half a point)"),
        (-0.026, 0.056, "costs between -2.6 and 5.6 points"),
        (0.006, 0.01, "costs between 0.6 and 1.0 points"),
        (None, None, "costs 1.5 points of accuracy in this one measurement"),
    ],
)
def test_the_price_is_an_interval(low: float | None, high: float | None, said: str) -> None:
    assert said in price(Interval(mean=0.015, low=low, high=high, n=3))


def claims(noise: np.ndarray, least: float) -> int:
    """How many audits claim an effect; `noise` is (audits, students, hard labels + twin + attacks, seeds)."""
    found = 0
    for audit in noise:
        leaks = [
            interval(list(student[2 + attack] - student[0]), least)
            for student in audit
            for attack in range(len(student) - 2)
        ]
        damage = min((interval(list(student[1] - student[2]), least) for student in audit), key=lambda gap: gap.mean)
        worst = max(leaks, key=lambda leak: leak.mean)
        found += is_above_zero(worst, len(leaks)) or is_above_zero(damage)
    return found


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_where_there_is_no_effect_hardly_an_audit_claims_one(seeds: int) -> None:
    """2,000 audits of three attacks on two students, whose accuracies are noise: at most 5 % claim something."""
    noise = np.random.default_rng(seeds).normal(0.85, 0.01, (2000, 2, 5, seeds))
    assert claims(noise, 0.0) <= (100 if seeds > 1 else 0)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("images", [20, 60, 300])
def test_few_test_images_do_not_make_a_claim(images: int, seeds: int) -> None:
    """The same with accuracies that are counts, of which two can agree by luck."""
    counts = np.random.default_rng(seeds).binomial(images, 0.85, (2000, 2, 5, seeds))
    assert claims(counts / images, least_spread(images)) <= (100 if seeds > 1 else 0)


def test_two_models_that_agree_on_few_images_may_differ_on_others() -> None:
    assert "between" in price(paired_interval([0.0] * 20))
    assert "costs no accuracy" in price(paired_interval([0.0] * 2000))
    cost = paired_interval([1.0, -1.0, *[0.0] * 8])
    half = quantile(0.975, 11) * math.sqrt(3) / 12  # (1 + 1 + 1 - 0) / 12**2
    assert (cost.mean, cost.high) == (0, pytest.approx(half))
