import math

import numpy as np
import pytest

from undistill.attacks.attack import FLOORS as FLOOR_ROLES
from undistill.attacks.attack import Role
from undistill.auditing.predictions import predicted, written
from undistill.auditing.schema import Cell, Interval, Threat, Trial
from undistill.auditing.statistics import (
    crossed_interval,
    interval,
    least_spread,
    paired_interval,
    preferred,
    quantile,
)
from undistill.auditing.verdict import Judge
from undistill.auditing.wording import beyond_labels, is_above_zero, price
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
        validation=accuracy,
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
    found = Judge(
        [
            cell("A()", side, accuracy, seed)
            for side, *both in (("victim", 0.9, 0.5), ("honest", 0.8, 0.4))
            for seed, accuracy in enumerate(both)
        ],
        (),
        10**9,
    ).minus(("victim", "A()", "ConvNet(width=2)"), ("honest", "A()", "ConvNet(width=2)"))
    assert found.mean == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


def test_worst_is_chosen_by_validation_images_and_floors_too() -> None:
    """Luck on test images does not make the worst thief."""
    lucky = [cell(f"{name}()", "victim", 0.9 if name == "Lucky" else 0.8) for name in ("Lucky", "Strong")]
    lucky = [one.model_copy(update={"validation": 0.99 if "Strong" in one.attack else 0.7}) for one in lucky]
    verdict = Judge([*cells(seeds=1), *lucky], (), 10**9).verdict(COST, "toys")
    assert verdict.worst_attack == verdict.best_attack == "Strong()"
    assert verdict.leak_hard.mean == pytest.approx(0.80 - 0.85)
    trials = [trial("Lucky()", 0.9), trial("Strong()", 0.3), trial("Lucky()", 0.2)]
    assert Judge([*cells(seeds=1), *lucky], trials, 10**9).verdict(COST, "toys").worst_attack == "Lucky()"


def test_what_true_labels_did_is_no_leak() -> None:
    """The victim is often wrong, so that its top answers teach worse than true labels, which a thief has, too."""
    few = [one.model_copy(update={"accuracy": 0.75, "validation": 0.75}) for one in cells() if "Hard" in one.attack]
    wrong = [*(one for one in cells(victim_kd=0.81) if "Hard" not in one.attack), *few]
    verdict = Judge(wrong, (), 10**9).verdict(COST, "toys")
    assert verdict.leak_hard.mean > 0.05
    assert "answers give nothing measurable beyond their labels" in verdict.sentence
    none = Threat(access="answers", data="unlabelled", form="full", buying="once", images=9)
    without = [one.model_copy(update={"threat": none}) if "Soft" in one.attack else one for one in wrong]
    assert "answers give 8.0 points beyond" in Judge(without, (), 10**9).verdict(COST, "toys").sentence


def test_how_much_could_hide_is_said() -> None:
    leak = Interval(mean=0.0, low=-0.061, high=0.061, n=3)
    verdict = Judge(cells(), (), 10**9).verdict(COST, "toys").model_copy(update={"leak": leak})
    assert beyond_labels(verdict).endswith("nothing measurable beyond their labels (at most 6.1 points)")


@pytest.mark.parametrize(
    ("hard", "labels", "expected"),
    [
        ((0.03, 0.01, 0.05), (0.025, 0.02, 0.03), 0.025),  # surely ahead of both: the smaller one
        ((0.03, 0.01, 0.05), (0.01, -0.01, 0.03), 0.01),  # of one only
        ((-0.05, -0.06, -0.04), (0.0, -0.07, 0.07), -0.05),  # surely behind one
    ],
)
def test_a_leak_is_ahead_of_both_floors(
    hard: tuple[float, ...], labels: tuple[float, ...], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"HardLabels()": hard, "LabelSmoothing(smoothing=0.1)": labels}
    intervals = {name: Interval(mean=mean, low=low, high=high, n=3) for name, (mean, low, high) in found.items()}
    monkeypatch.setattr(Judge, "minus", lambda self, a, b: intervals[b[1]])
    leak = Judge(cells(), (), 10**9).leak(("victim", "SoftLabels(T=4, alpha=0.9)", "ConvNet(width=2)"))
    assert leak is not None
    assert leak.mean == expected


def test_who_had_more_images_than_his_floors_proves_nothing() -> None:
    few, many = (
        Threat(access="answers", data="labelled", form="full", buying="once", images=images) for images in (66, 2000)
    )
    threats = {"SoftLabels": many, "HardLabels": few, "Scratch": few, "LabelSmoothing": few}
    unequal = [one.model_copy(update={"threat": threats[one.attack.partition("(")[0]]}) for one in cells(0.95)]
    verdict = Judge(unequal, (), 10**9).verdict(COST, "toys")
    assert verdict.leak is None
    assert "it is not assessed what the protected model's answers give beyond their labels" in verdict.sentence


def test_the_listed_setting_stays_where_others_are_ahead_by_luck() -> None:
    assert preferred([0.80, 0.83, 0.70], 100) == 0, "a standard error is 4 points"
    assert preferred([0.80, 0.85, 0.70], 100) == 1
    assert preferred([0.80, 0.83, 0.83], 10_000) == 1
    assert preferred([0.80, 0.81], 0) == 1, "a report of an earlier version"


def trial(attack: str, score: float) -> Trial:
    column = {"side": "victim", "attack": attack, "listed": attack, "student": "ConvNet(width=2)", "seed": 1}
    return Trial(**column, recipe="", score=score, validation=score, queries=1, seconds=1.0)


def test_predictions_are_paired_by_image() -> None:
    labels = np.arange(12) % 3
    wrong = (labels + 1) % 3
    right = cell("A()", "victim", 1.0).model_copy(update={"predictions": written(labels, 3)})
    half = np.where(np.arange(12) < 6, labels, wrong)
    other = cell("A()", "honest", 0.5).model_copy(update={"predictions": written(half, 3)})
    both = [one.model_copy(update={"seed": seed}) for one in (right, other) for seed in (0, 1)]
    found = Judge(both, (), 12, 3, labels).minus(("victim", "A()", right.student), ("honest", "A()", right.student))
    differences = np.stack([(labels == labels) * 1.0 - (half == labels)] * 2)
    assert found == crossed_interval(differences)
    assert found.mean == 0.5
    assert predicted(written(np.array([0, 300]), 301), 301).tolist() == [0, 300]


def test_crossed_interval_by_hand() -> None:
    differences = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    seeds = 0.25**2 / 2  # an image is a quarter, and 0.18 the spread that was seen
    by_image = np.array([1, 0.5, 0, 0])
    image = (1.25 + 1 - 1.5**2 / 6) / 36
    rest = differences - np.array([[0.25], [0.5]]) - by_image + 0.375
    image = max(image - (rest**2).sum() / 3 / 8, 1 / 36)
    half = math.hypot(quantile(0.975, 1) * math.sqrt(seeds), quantile(0.975, 5) * math.sqrt(image))
    found = crossed_interval(differences)
    assert (found.mean, found.high) == (0.375, pytest.approx(0.375 + half))
    assert crossed_interval(differences[:1]).low is None


def test_seeds_that_agree_by_luck_leave_the_luck_of_the_images() -> None:
    """Two seeds with the same mean difference, on other images."""
    differences = np.zeros((2, 10_000))
    differences[0, :400], differences[1, 400:800] = 1, 1
    found = crossed_interval(differences)
    assert found.mean == pytest.approx(0.04)
    assert found.low == pytest.approx(paired_interval(list(differences.mean(0))).low)


def test_verdict_by_hand() -> None:
    verdict = Judge(cells(), (), 10**9).verdict(COST, "toys")
    assert verdict.leak_hard.mean == pytest.approx(0.70 - 0.85)
    assert verdict.leak_label_smoothing.mean == pytest.approx(0.70 - 0.82)
    assert verdict.kd_gain.mean == pytest.approx(0.70 - 0.80)
    assert verdict.kd_gain_honest.mean == pytest.approx(0.84 - 0.80)
    assert verdict.damage.mean == pytest.approx(0.84 - 0.70)
    assert verdict.leak_hard.high == pytest.approx(verdict.leak_hard.low)  # the shift of a seed cancels
    assert verdict.sentence == (
        "On toys, the best thief of 2 that were tried (copying only the top answers) gets a copy of 87.0% accuracy; "
        "the protected model's answers give nothing measurable beyond their labels. Plain distillation from the "
        "protected model "
        "gives a student 14.0 points worse than from the unprotected one. The protection costs between 0.0 and 2.0 "
        "points of accuracy."
    )


def test_a_tuned_thief_is_named_by_what_he_did() -> None:
    listed = {"listed": "SoftLabels(T=4, alpha=0.9)", "attack": "SoftLabels(T=1, alpha=0.9)"}
    tuned = [one.model_copy(update=listed) if "Soft" in one.attack else one for one in cells(0.9)]
    verdict = Judge(tuned, (), 10**9).verdict(COST, "toys")
    assert "(SoftLabels(T=1, alpha=0.9), tuned) gets a copy" in verdict.sentence


def test_worst_attack_decides() -> None:
    verdict = Judge(cells(Clever=0.88), (), 10**9).verdict(COST, "toys")
    assert verdict.worst_attack == "Clever()"
    assert verdict.leak_hard.mean == pytest.approx(0.03)
    assert verdict.kd_gain.mean == pytest.approx(-0.10)  # the paper's figure is about plain KD alone
    assert (
        "of 90.0% accuracy; the protected model's answers give 3.0 points beyond their labels (Clever())"
        in verdict.sentence
    )


def test_worst_student_decides() -> None:
    other = [c.model_copy(update={"student": "PlainCNN(width=32)", "accuracy": c.accuracy + 0.1}) for c in cells()]
    weak = cells(victim_kd=0.84)
    verdict = Judge(weak + other, (), 10**9).verdict(COST, "toys")
    assert verdict.worst_student == "ConvNet(width=2)"
    assert verdict.damage.mean == pytest.approx(0.0)
    assert "a student not measurably worse than from the unprotected one" in verdict.sentence


def test_missing_cells_are_named() -> None:
    with pytest.raises(SpecError, match="no attack of the role 'top answers' on side 'victim'"):
        Judge([c for c in cells() if not c.attack.startswith("Hard")], (), 10**9).verdict(COST, "toys")
    with pytest.raises(SpecError, match="no attack beside the floors"):
        Judge([c for c in cells() if c.role in FLOOR_ROLES], (), 10**9).verdict(COST, "toys")


def test_single_seed_has_no_interval() -> None:
    verdict = Judge(cells(seeds=1, Clever=0.99), (), 10**9).verdict(COST, "toys")
    assert verdict.damage.low is None
    assert "With one student of each kind it is not assessed" in verdict.sentence
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


def students(random: np.random.Generator, seeds: int, images: int, accuracy: float, luck: float) -> np.ndarray:
    """(S, N): whether each of some students is right on each image, some of which are harder than others."""
    hard = random.normal(0, 1.5, images)
    level = np.log(accuracy / (1 - accuracy)) * 1.35 + random.normal(0, luck / (accuracy * (1 - accuracy)), (seeds, 1))
    return (random.logistic(level - hard) > 0).astype(float)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("images", [60, 600])
def test_where_there_is_no_effect_hardly_an_audit_claims_one(seeds: int, images: int) -> None:
    """2,000 audits without a leak and without damage: at most 5 % claim one of the two, and none of one seed.

    The worst thief is chosen by other images and other students, so that he is any one of those without an effect.
    """
    random, found = np.random.default_rng([seeds, images]), 0
    for _ in range(2000):
        leak, damage = (np.subtract(*(students(random, seeds, images, 0.85, 0.01) for _ in range(2))) for _ in range(2))
        found += any(is_above_zero(crossed_interval(difference)) for difference in (leak, damage))
    assert found <= (100 if seeds > 1 else 0)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("images", [20, 60, 300, 10**6])
def test_nor_where_every_seed_has_its_own_test_images(images: int, seeds: int) -> None:
    """Two claims, each at 2.5 %: 4.9 % in theory, and three standard errors of the simulation."""
    counts = np.random.default_rng(seeds).binomial(images, 0.85, (2000, 2, 2, seeds)) / images
    claimed = [any(is_above_zero(interval(list(a - b), least_spread(images))) for a, b in audit) for audit in counts]
    assert sum(claimed) <= (100 + 30 if seeds > 1 else 0)


def test_a_leak_of_two_points_is_found() -> None:
    """sd 0.5 points between seeds, three seeds, 10,000 test images: in at least 80 % of the audits.

    The two students differ on 8 % of the images, as two that are taught alike do.
    """
    random, found = np.random.default_rng(0), 0
    for _ in range(200):
        images = random.normal(0, 1, 10_000)
        gains = 0.02 + random.normal(0, 0.005, (3, 1))
        tilt, drawn = 0.8 * np.tanh(images), random.random((3, 10_000))
        better, worse = 0.04 * (1 + tilt) + gains / 2, 0.04 * (1 - tilt) - gains / 2
        found += is_above_zero(crossed_interval(1.0 * (drawn < better) - (drawn > 1 - worse)))
    assert found >= 160


def test_two_models_that_agree_on_few_images_may_differ_on_others() -> None:
    assert "between" in price(paired_interval([0.0] * 20))
    assert "costs no accuracy" in price(paired_interval([0.0] * 2000))
    cost = paired_interval([1.0, -1.0, *[0.0] * 8])
    half = quantile(0.975, 11) * math.sqrt(3) / 12  # (1 + 1 + 1 - 0) / 12**2
    assert (cost.mean, cost.high) == (0, pytest.approx(half))


def test_who_has_the_weights_says_nothing_about_answers() -> None:
    copy = cell("FineTune()", "victim", 0.97).model_copy(update={"role": Role.WHITE_BOX})
    verdict = Judge([*cells(seeds=1), copy], (), 10**9).verdict(COST, "toys")
    assert verdict.best_attack == "FineTune()"
    assert verdict.worst_attack == "SoftLabels(T=4, alpha=0.9)"
    bound = cell("PBayes(oracle=True)", "victim", 0.97).model_copy(
        update={
            "role": Role.BOUND,
            "threat": Threat(access="weights", data="labelled", form="label", buying="once", images=9),
        }
    )
    found = Judge([*cells(seeds=1), bound], (), 10**9).verdict(COST, "toys")
    assert (found.worst_attack, found.best_attack) == (verdict.worst_attack, "HardLabels()")
