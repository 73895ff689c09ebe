"""`decide`: ship, ship with limits, or do not ship, by the figures of a report. docs/review.md states the rules."""

from statistics import fmean
from typing import Literal, NamedTuple

from undistill.auditing.curve import GAPS, harmless
from undistill.auditing.schema import Report
from undistill.auditing.verdict import Judge, adapts
from undistill.auditing.wording import NOTHING, beyond_labels, is_above_zero, points

Choice = Literal["ship", "ship with limits", "do not ship"]
FEW = 3
"""Seeds below which nothing is claimed."""
WIDE = 0.05
"""Accuracy by which answers may help thieves at most, for a claim that they do not."""
DOUBTS = ("selected_on_test", "no_gain_from_honest", "diverged", "student_at_chance")
"""Flags under which figures decide nothing."""


class Decision(NamedTuple):
    """The first half page of a report, for whoever decides about the model."""

    choice: Choice
    why: list[str]
    limits: list[str]
    """Under which the choice holds, or what has to be done first."""
    cost: str


def decide(report: Report) -> Decision:
    """The decision about giving answers of the model to others."""
    cost = _cost(report)
    if doubts := _doubts(report):
        return Decision("do not ship", [why for why, _ in doubts], [todo for _, todo in doubts], cost)
    if faults := _faults(report):
        return Decision("do not ship", [why for why, _ in faults], [todo for _, todo in faults], cost)
    gap = report.victim.accuracy - _best_copy(report)
    why = [f"{_capital(beyond_labels(report.verdict))}."]
    if gap > GAPS[0]:
        why.append(f"The best copy by answers alone is {points(gap)} worse than the model.")
        return Decision("ship with limits" if (limits := _always(report)) else "ship", why, limits, cost)
    how_far = f"{points(gap)} worse than" if gap > 0 else "as good as"
    why.append(f"The best copy by answers alone is {how_far} the model; only fewer answers stop what labels give away.")
    return Decision("ship with limits", why, [_limit(report), *_always(report)], cost)


def _doubts(report: Report) -> list[tuple[str, str]]:
    """Why the figures decide nothing, each with what to do."""
    found = []
    if any(pair.may_be_memory for pair in report.pairs):
        found.append(
            (
                "The model may have been trained on the images that measure it.",
                "Name images that it has not seen (undistill adopt --test DATA), and audit it again.",
            )
        )
    if report.verdict.kd_gain.n < FEW:
        found.append(
            (
                f"Each copy was trained {_times(report.verdict.kd_gain.n)}, which shows no spread.",
                f"Audit it again with {FEW} seeds or more (--seeds {FEW}).",
            )
        )
    elif report.verdict.leak is None:
        found.append(
            (
                "It was not assessed what answers give beyond their labels.",
                "Add floors with as many images as the thief.",
            )
        )
    elif (most := report.verdict.leak.high) is not None and most > WIDE and not is_above_zero(report.verdict.leak):
        found.append(
            (
                f"Answers may give thieves up to {points(most)} beyond labels: too wide.",
                "Audit it again with more seeds, or on more test images.",
            )
        )
    found += [(flag.message, f"See {flag.name} below.") for flag in report.flags if flag.name in DOUBTS]
    return found


def _faults(report: Report) -> list[tuple[str, str]]:
    """Why the model should not answer others as it does, each with what to do."""
    found, leak = [], report.verdict.leak
    if leak is not None and is_above_zero(leak):
        found.append(
            (
                f"Answers give thieves {points(leak.mean)} beyond labels ({report.verdict.worst_attack}).",
                "Show less of an answer, such as Sealed(levels=4) or LabelOnly(), and audit that.",
            )
        )
    for pair in report.pairs:
        lost = report.verdict.cost
        if pair.price is not None and lost and lost.low is not None and 100 * lost.low > pair.price:
            found.append((f"It costs surely more than the stated {pair.price:g} points of accuracy.", "A lower price."))
            break
    return found


def _limit(report: Report) -> str:
    most = harmless(report)
    if most is None:
        return "A budget of queries for each client, and for all together; undistill audit --curve measures which."
    if most == 0:
        least = min(cell.budget or cell.queries for cell in report.curve)
        return f"Fewer than {least:,} queries for each client: so many bought a copy within {points(GAPS[0])}."
    return (
        f"At most {most:,} queries for each client, and as many for all who may share what they got: up to there every "
        f"copy was more than {points(GAPS[0])} worse."
    )


def _always(report: Report) -> list[str]:
    """Limits that hold however bad the copies are."""
    found = []
    if not adapts(report):
        found.append(
            "Only plain thieves were tried: audit it with attacks that adapt (--suite standard-1 or thorough-1)."
        )
    if any(pair.responses for pair in report.pairs):
        found.append("Give answers and never the file: whoever has it strips what changes answers alone.")
    return found


def _cost(report: Report) -> str:
    """The price for users of the model, in images."""
    said = f"Of 100 images it sorts {round(100 * report.victim.accuracy, 1):g} rightly"
    if report.twin is None:
        return f"{said}. What it did without its protection is not known."
    said += f"; without protection {round(100 * report.twin.honest.accuracy, 1):g}."
    low, high = report.twin.cost.low, report.twin.cost.high
    if low is not None and high is not None:
        ends = (f"{100 * abs(end):.1f} {'fewer' if end > 0 else 'more'}" for end in (low, high))
        said += f" By luck alone that may be off: it may also be anything from {' to '.join(ends)}."
    ece = report.victim.ece - report.twin.honest.ece
    if abs(ece) > 2 * NOTHING:
        said += f" Its confidences are {points(ece)} {'further from' if ece > 0 else 'nearer to'} its accuracy."
    return said


def _best_copy(report: Report) -> float:
    """Accuracy of the best thief who has answers alone."""
    judge = Judge.of(report)
    return fmean(cell.accuracy for cell in judge.table[judge.best_of_answers].values())


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
