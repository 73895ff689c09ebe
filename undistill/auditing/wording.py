"""The verdict in words, for someone outside the field. They claim no more than was measured."""

from undistill.auditing.schema import Interval, Report, Verdict

TITLE, UNPROTECTED = "Audit of ", "an unprotected model"
NOTHING = 0.005  # accuracy lost that counts as none


def sentence(verdict: Verdict, data: str, thief: str) -> str:
    """Say what the best `thief` got, what plain imitation lost, and what the protection costs.

    One seed claims nothing.
    """
    if verdict.damage is None or verdict.cost is None:
        beyond = f"; {beyond_labels(verdict)}" if verdict.kd_gain.n > 1 else ""
        return (
            f"On {data}, {thief}{beyond}.{bound(verdict.bits)} Without an unprotected twin it is not assessed what "
            "the protection does, nor what it costs."
        )
    if verdict.damage.n < 2:
        return (
            f"On {data}, {thief}. With one student of each kind it is not assessed what answers give beyond their "
            f"labels, nor what the protection does; more seeds assess it.{bound(verdict.bits)} {price(verdict.cost)}"
        )
    damage = f"{points(verdict.damage.mean)} worse" if is_above_zero(verdict.damage) else "not measurably worse"
    imitation = f"Plain distillation from the protected model gives a student {damage} than from the unprotected one."
    return f"On {data}, {thief}; {beyond_labels(verdict)}.{bound(verdict.bits)} {imitation} {price(verdict.cost)}"


def protection(report: Report) -> str:
    """The defences of the model; empty where it is known to have none, or nothing is known of any."""
    named = report.title.removeprefix(TITLE)
    return "" if named == UNPROTECTED or report.pairs[0].reached else named


def beyond_labels(verdict: Verdict) -> str:
    found = verdict.leak
    if found is None:
        return (
            "it is not assessed what the protected model's answers give beyond their labels, since the worst thief had "
            "more images than those who take labels alone"
        )
    if is_above_zero(found):
        return f"the protected model's answers give {points(found.mean)} beyond their labels ({verdict.worst_attack})"
    most = f" (at most {points(found.high)})" if found.high is not None and found.high > 0 else ""
    return f"the protected model's answers give nothing measurable beyond their labels{most}"


def bound(bits: float | None) -> str:
    """How many answers there are at most for each label, by construction; empty where nothing bounds them."""
    if bits is None:
        return ""
    if bits == 0:
        return " By construction all answers with the same label are the same, whatever a thief asks."
    return (
        f" By construction there are at most {2**bits:.0f} answers for each label, so that one carries at most "
        f"{bits:.3g} bits beyond it, whatever a thief computes."
    )


def is_above_zero(difference: Interval) -> bool:
    """Whether a mean difference is above zero by more than luck explains."""
    return difference.low is not None and difference.low > 0


def price(cost: Interval) -> str:
    """The cost in accuracy, as an interval; none only where all of it is less than half a point."""
    if cost.low is None or cost.high is None:
        return f"The protection costs {100 * cost.mean:.1f} points of accuracy in this one measurement."
    if cost.low >= -NOTHING and cost.high <= NOTHING:
        return "The protection costs no accuracy (less than half a point)."
    return f"The protection costs between {100 * cost.low:.1f} and {100 * cost.high:.1f} points of accuracy."


def points(share: float) -> str:
    """0.023 -> '2.3 points'."""
    return f"{abs(share) * 100:.1f} points"
