"""The verdict in words, for someone outside the field. They claim no more than was measured."""

from functools import cache

from scipy.stats import t as student_t

from undistill.auditing.schema import Interval, Verdict

RISK = 0.025  # that a claim is made where there is no effect, one for what leaks and one for what is spoilt
NOTHING = 0.005  # accuracy lost that counts as none


def sentence(verdict: Verdict, data: str, thief: str, attempts: int) -> str:
    """Say what the best `thief` got, what plain imitation lost, and what the protection costs.

    `attempts` is the number of attacks among which the worst was picked: the more are tried, the more one of them gains
    by luck. One seed claims nothing.
    """
    if verdict.damage.n < 2:
        return (
            f"On {data}, {thief}. With one student of each kind that is no claim about what the protection does; more "
            f"seeds make one. {price(verdict.cost)}"
        )
    leak = (
        f"{verdict.worst_attack} gains {points(verdict.leak_hard.mean)} over copying only the top answers"
        if is_above_zero(verdict.leak_hard, attempts)
        else "no attack gains measurably over copying only the top answers"
    )
    damage = f"{points(verdict.damage.mean)} worse" if is_above_zero(verdict.damage) else "not measurably worse"
    return (
        f"On {data}, {thief}; {leak}. Plain distillation from the protected model gives a student {damage} than from "
        f"the unprotected one. {price(verdict.cost)}"
    )


def is_above_zero(difference: Interval, attempts: int = 1) -> bool:
    """Whether a mean difference, the largest of so many that were tried, is above zero by more than luck explains."""
    if difference.low is None or difference.mean <= 0:
        return False
    usual, wanted = (quantile(1 - RISK / count, difference.n - 1) for count in (1, attempts))
    return difference.mean - (difference.mean - difference.low) * wanted / usual > 0


@cache
def quantile(share: float, degrees: int) -> float:
    """Of Student's t distribution."""
    return float(student_t.ppf(share, degrees))


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
