"""A price instead of a weight: the weight of the undermining term is found from the accuracy that may be lost.

The network is trained from the unprotected weights with a weight that experience suggests for the price, and again
with another one where validation images say that it lost more or less. See docs/price.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from undistill.core.errors import ModelError
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy_lost, evaluate

ONE_POINT = 0.03  # the weight at which about one point of accuracy is lost, as far as is known before
TRIES, SHARE = 3, 0.5  # trainings at most, and the share of the recipe's epochs that each takes
NEAR = 0.25  # of the price: by so much what is believed to be lost may differ from it
FURTHEST = 4.0  # factor by which a weight is changed
LEAST_COST = 0.002  # points that the weight of one point costs, at least
RUINED = 2.0  # points, surely lost beyond the price


@dataclass(frozen=True)
class Attempt:
    """One training, and the points of accuracy that it lost on validation images, with their standard error."""

    network: nn.Module
    weight: float
    lost: float
    error: float
    history: Sequence[dict[str, float]]

    @property
    def strength(self) -> float:
        """The points that are lost by experience: they grow with the square of the weight."""
        return (self.weight / ONE_POINT) ** 2

    @property
    def least(self) -> float:
        """The points that were surely lost: two standard errors below the measured ones."""
        return self.lost - 2 * self.error


def at_price(price: float, current: nn.Module, data: Split, fit: Fit, train: Callable[[float], nn.Module]) -> nn.Module:
    """The network of `train(weight)` that loses about `price` points of the accuracy of `current`.

    At most three trainings of half of the recipe's epochs each. Raises `ModelError` where all of them cost far more
    than the price: it is not undermining that costs so much, but training.
    """
    samples, attempts = data.validation, list[Attempt]()
    before = evaluate(current, samples).cpu()
    weight = ONE_POINT * math.sqrt(price)
    for _ in range(TRIES):
        known = len(fit.history)
        network = train(weight)
        lost, error = accuracy_lost(evaluate(network, samples).cpu(), before, samples.labels)
        attempts.append(Attempt(network, weight, 100 * lost, 100 * error, fit.history[known:]))
        if abs(believed(attempts[-1], attempts) - price) <= NEAR * price:
            break
        aim = ONE_POINT * math.sqrt(price / cost(attempts))
        weight = min(max(aim, weight / FURTHEST), weight * FURTHEST)
    best = min(attempts, key=lambda one: _distance(believed(one, attempts), price))
    if best.least > price + RUINED:
        raise ModelError(
            f"Training on costs {best.lost:.1f} points of accuracy, however little it undermines, and the price is "
            f"{price:g}. Lower recipe.lr, or train the unprotected network for longer first."
        )
    fit.choose(best.history)
    fit.found["omega"] = best.weight
    return best.network


def cost(attempts: Sequence[Attempt]) -> float:
    """Points that a strength of 1 costs, by all attempts together with what is known before: 1, give or take 1.

    The mean of a normal distribution after measurements of `lost = cost x strength` with their errors. Attempts are
    measured on the same images, so that together they are no more exact than the most exact one.
    """
    exact = [(one.strength / one.error) ** 2 for one in attempts]
    measured = sum(weight * one.lost / one.strength for weight, one in zip(exact, attempts, strict=True)) / sum(exact)
    return max((1 + max(exact) * measured) / (1 + max(exact)), LEAST_COST)


def believed(attempt: Attempt, attempts: Sequence[Attempt]) -> float:
    """Points that an attempt is believed to lose: as all of them suggest, but no less than it surely lost."""
    return max(cost(attempts) * attempt.strength, attempt.least)


def _distance(lost: float, price: float) -> tuple[bool, float]:
    """How far a loss is from the price; what exceeds it clearly is further than what does not."""
    return lost > (1 + NEAR) * price, abs(lost - price)
