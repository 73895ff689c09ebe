"""Every way in which the values of an audit can mislead, each with a name; a reader sees those that apply."""

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import fmean

from undistill.auditing.schema import ClassLoss, Flag, Report
from undistill.training.answers import ASKED
from undistill.training.recipe import Recipe

Check = Callable[[Report], str | None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def raised(report: Report) -> list[Flag]:
    """The flags that apply to `report`."""
    return list(_raised(report))


def _raised(report: Report) -> Iterator[Flag]:
    for name, function in CHECKS.items():
        if message := function(report):
            yield Flag(name=name, message=message)


@check
def selected_on_test(report: Report) -> str | None:
    if not report.data.startswith("Leaky("):
        return None
    return (
        "Epochs, prices and calibrations were chosen by the test images: every accuracy and confidence here looks too "
        "good. Use the data without Leaky."
    )


@check
def few_seeds(report: Report) -> str | None:
    n = report.verdict.kd_gain.n
    return (
        f"Only {n} seed{'s' * (n > 1)}: the spread between runs is not known well. Use at least 3." if n < 3 else None
    )


@check
def one_teacher(report: Report) -> str | None:
    if len(report.pairs) > 1:
        return None
    return (
        "One trained victim: the intervals show the spread over students, not over protected models, "
        "which is often larger."
    )


@check
def no_twin(report: Report) -> str | None:
    if report.honest:
        return None
    return (
        "No unprotected twin is known, so nothing here says what the protection does or costs: a student may be bad "
        "because the model is protected, or because it imitates badly. --honest RUN names a twin."
    )


@check
def no_gain_from_honest(report: Report) -> str | None:
    gain = report.verdict.kd_gain_honest
    if gain is None or gain.mean >= -0.01:
        return None
    return (
        f"Distilling from the unprotected model is {-100 * gain.mean:.1f} points worse than learning without any "
        "teacher, so weak students of the victim prove little. Tune the attack (T, alpha, epochs) first."
    )


@check
def not_tuned(report: Report) -> str | None:
    if not report.trials or _most_trials(report) > 1:
        return None
    return (
        "No thief tuned his attack: each tried the listed setting alone. A careful one may get more; audit with "
        "--suite standard-1, or with --trials 3."
    )


def _most_trials(report: Report) -> int:
    return max(Counter(trial.column for trial in report.trials).values(), default=0)


@check
def few_validation_images(report: Report) -> str | None:
    images = min((trial.images for trial in report.trials if trial.images), default=0)
    if not images or images >= 500 or _most_trials(report) < 2:
        return None
    return (
        f"Thieves tuned on {images} validation images, where the standard error of an accuracy is up to "
        f"{50 / images**0.5:.1f} points. A setting is taken only if it is ahead by one, so that a better one may have "
        "been missed. More data helps, or setting the attack by hand."
    )


@check
def not_tried(report: Report) -> str | None:
    if not report.skipped:
        return None
    reasons = " ".join(f"{name}: {why}" for name, why in report.skipped.items())
    return f"The suite lists more than could be tried on these networks. {reasons}"


@check
def labels_suffice(report: Report) -> str | None:
    beyond = report.verdict.leak_hard
    if beyond.mean > 0.005 or beyond.low is None or beyond.high is None:
        return None
    return (
        "Copying the top answers alone is as good as the worst case (the 95 % interval of the difference ends at "
        f"{100 * beyond.high:+.1f} points). No protection of answers that keeps the top answer can lower that; only "
        "fewer answers do (--curve shows how fast a copy becomes good)."
    )


@check
def zeros_in_answers(report: Report) -> str | None:
    share = max(pair.zeros for pair in report.pairs)
    if share <= 0:
        return None
    return (
        f"{share:.1%} of the victim's probabilities are 0. An attack that takes their logarithm reads a floor there, "
        "which may weaken it for no reason of the protection; a careful thief tunes that floor."
    )


@check
def costly(report: Report) -> str | None:
    cost, stated = report.verdict.cost, _stated_price(report) or 0.0
    if cost is None or cost.low is None or cost.low <= max(0.02, stated / 100):
        return None
    return f"The protection costs at least {cost.low * 100:.1f} points of accuracy; its users will notice."


MORE_ECE = 0.01
CLASS_PAYS = 3.0  # times the price


@check
def miscalibrated(report: Report) -> str | None:
    if report.costs is None or report.costs.ece <= MORE_ECE:
        return None
    return (
        f"Confidences fit worse than before: the expected calibration error rose by {100 * report.costs.ece:.1f} "
        f"points, to {100 * report.victim.ece:.1f} %. Whoever acts on confidences is misled; "
        "--defence 'Temperature(T=None)' or --defence 'Sealed()' after the others calibrates them."
    )


@check
def a_class_pays(report: Report) -> str | None:
    worst = max((pair.worst_class for pair in report.pairs if pair.worst_class), key=_least_lost, default=None)
    cost = report.verdict.cost
    price = max((_stated_price(report) or 0.0) / 100, cost.mean if cost else 0.0, 0.0)
    if worst is None or _least_lost(worst) <= CLASS_PAYS * price:
        return None
    return (
        f"The class {worst.name} loses {100 * worst.lost.mean:.1f} points of accuracy, more than three times the price "
        f"({100 * price:.1f} points). Look at by_class in report.json; a lower price spares it."
    )


def _least_lost(worst: ClassLoss) -> float:
    return -1.0 if worst.lost.low is None else worst.lost.low


@check
def top_answers_flip(report: Report) -> str | None:
    share = max(pair.flips for pair in report.pairs)
    if share <= 0:
        return None
    return (
        f"A response changes the top answer to {share:.1%} of the test images, so that users get other "
        "classes than the network found. Sealed, Rounding and others keep the top answer."
    )


@check
def price_not_kept(report: Report) -> str | None:
    stated, cost = _stated_price(report), report.verdict.cost
    if stated is None or cost is None or cost.low is None or 100 * cost.low <= stated:
        return None
    return (
        f"The price was stated as {stated:g} points of accuracy, and at least {100 * cost.low:.1f} were paid. State a "
        "lower price, or give more images to validation, by which it is kept."
    )


@check
def price_beyond_validation(report: Report) -> str | None:
    stated, known = _stated_price(report), [pair.validation_cost for pair in report.pairs if pair.validation_cost]
    widths = [50 * (cost.high - cost.low) for cost in known if cost.low is not None and cost.high is not None]
    if stated is None or not widths or max(widths) <= stated:
        return None
    return (
        f"The validation images measure an accuracy to ± {max(widths):.1f} points, and the price is {stated:g}: it was "
        "kept by experience with other data, too. More validation images mend that."
    )


def _stated_price(report: Report) -> float | None:
    return max((pair.price for pair in report.pairs if pair.price is not None), default=None)


@check
def barely_diverged(report: Report) -> str | None:
    if report.divergence is None or report.divergence >= 1:
        return None
    return (
        f"The victim answers almost as the unprotected model does (T^2 KL {report.divergence:.2f} nats); "
        "a larger omega makes it differ."
    )


@check
def underfitted_teacher(report: Report) -> str | None:
    known = [pair.honest_train_accuracy for pair in report.pairs if pair.honest_train_accuracy is not None]
    fitted = fmean(known) if known else 1.0
    if fitted >= 0.99:
        return None
    return (
        f"The honest teacher fits only {fitted:.1%} of its training images; undermining is nearly free "
        "only for one that fits them all."
    )


@check
def students_still_learning(report: Report) -> str | None:
    late = max(
        fmean(c.late_gain for c in report.cells if c.attack == name) for name in {c.attack for c in report.cells}
    )
    if late <= 0.02:
        return None
    longer = 3 * max(Recipe.parse(report.recipe).epochs, 1)
    return (
        f"Students had not converged: some gained {100 * late:.1f} points in the last fifth of their training, so that "
        f"a thief who trains longer gets more than is said here. Train them for longer: --set recipe.epochs={longer}."
    )


@check
def student_at_chance(report: Report) -> str | None:
    guess, n = 1 / report.classes, min(pair.test_images for pair in report.pairs)
    bar = guess + 3 * (guess * (1 - guess) / n) ** 0.5
    chance = sorted({c.attack for c in report.cells if c.accuracy < bar})
    if not chance:
        return None
    return (
        f"Students of {', '.join(chance)} answer hardly better than chance: tune that attack; "
        "its training was too short, or diverged."
    )


@check
def diverged(report: Report) -> str | None:
    lost = [cell for cell in report.cells if cell.diverged]
    if not lost:
        return None
    return (
        f"{len(lost)} student{'s' * (len(lost) > 1)} ended without a result and count as useless ({lost[0].attack}: "
        f"{lost[0].diverged:.200}). A careful thief mends that."
    )


@check
def adopted_weights(report: Report) -> str | None:
    if not any(pair.may_be_memory for pair in report.pairs):
        return None
    gap = fmean(pair.membership_gap for pair in report.pairs)
    if not report.honest:
        return (
            "Nobody here knows on which images this model was trained. If those tested here were among them, its "
            "accuracy is memory and too high, and so is that of its copies."
        )
    return (
        "The unprotected model started from weights made elsewhere. If those were trained on the images tested here, "
        f"accuracies of both models are memory and too high (it is {100 * gap:+.1f} points surer of training than of "
        "test images). Name images that it has not seen: undistill adopt --test DATA."
    )


@check
def stripped_with_the_weights(report: Report) -> str | None:
    responses = list(dict.fromkeys(text for pair in report.pairs for text in pair.responses))
    if not responses:
        return None
    return f"A thief who has the weights strips {', '.join(responses)}; that protects an interface, not a file."


@check
def answers_vary(report: Report) -> str | None:
    varying = [pair.self_agreement for pair in report.pairs if pair.answers_vary]
    if not varying:
        return None
    return (
        f"The victim answers one image differently each time: asked {ASKED} times, it kept its top answer for "
        f"{min(varying):.1%} of the test images. Its accuracy is the mean over these. None of its answers was "
        "remembered; a thief who asks several times and averages may gain more than these did."
    )


@check
def another_twin(report: Report) -> str | None:
    if all(pair.same_origin for pair in report.pairs):
        return None
    return (
        "The victim was not protected from the unprotected model named here, so differences between the two "
        "may come from how they were trained rather than from the protection."
    )


@check
def small_test_set(report: Report) -> str | None:
    n = min(pair.test_images for pair in report.pairs)
    if n >= 500:
        return None
    half = 100 * 1.96 * 0.5 / n**0.5
    return (
        f"With {n} test images an accuracy is uncertain by up to {half:.1f} points either way (95 %); differences "
        "below that say little."
    )
