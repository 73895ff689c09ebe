"""A price instead of a weight: the weight of the undermining term is found from the accuracy that may be lost.

The network is trained from the unprotected weights with a weight that experience suggests for the price, and again
with another one where validation images say that it lost more or less. See docs/price.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from undistill.core.errors import ModelError, NonFinite, remark
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy_lost, evaluate

ONE_POINT = 0.03  # the weight at which experience expects a point of accuracy to be lost, at T = 4
TRIES, SHARE = 3, 0.5  # trainings at most, and the share of the recipe's epochs that each takes
NEAR = 0.25  # of the price: by so much what is believed to be lost may differ from it
UP = 1.4  # factor by which a weight is raised at least
FAR = 3.0, 1.5  # at most, by the second training and by the last, which must not be wasted on a weight that ruins
DOWN = 4.0  # factor by which it is lowered at most
HIGHEST = 1.0  # weight
RUINED = 2.0  # points, surely lost beyond the price


@dataclass(frozen=True)
class Attempt:
    """One training, and the points of accuracy that it lost on validation images, with their standard error."""

    network: nn.Module | None
    """None where training diverged."""
    weight: float
    lost: float
    error: float
    history: Sequence[dict[str, float]]

    @property
    def believed(self) -> float:
        """Points that are believed to be lost: what was measured, and where that is noise, what experience suggests.

        Experience expects the points to grow with the square of the weight, give or take as many. What was measured
        is believed down to one standard error below it, whatever experience says.
        """
        trust = self._suggested**2 / (self._suggested**2 + self.error**2)
        return max(trust * self.lost + (1 - trust) * self._suggested, self.lost - self.error)

    @property
    def at_most(self) -> float:
        """Points that may be lost: one standard error of the belief above it."""
        return self.believed + self._suggested * self.error / math.hypot(self._suggested, self.error)

    @property
    def _suggested(self) -> float:
        return (self.weight / ONE_POINT) ** 2


def at_price(price: float, current: nn.Module, data: Split, fit: Fit, train: Callable[[float], nn.Module]) -> nn.Module:
    """The network of `train(weight)` that loses about `price` points of the accuracy of `current`.

    At most three trainings of half of the recipe's epochs each, and no more than one and a half times those epochs.
    Raises `ModelError` where all of them surely cost far more than the price.
    """
    samples, attempts = data.validation, list[Attempt]()
    before = evaluate(current, samples).cpu()
    weight = ONE_POINT * math.sqrt(price)
    for _ in range(tries(fit.recipe.epochs)):
        known = len(fit.history)
        try:
            network = train(weight)
            lost, error = accuracy_lost(evaluate(network, samples).cpu(), before, samples.labels)
            attempts.append(Attempt(network, weight, 100 * lost, 100 * error, fit.history[known:]))
        except NonFinite:  # a smaller weight may do
            attempts.append(Attempt(None, weight, 100.0, 0.0, ()))
        if abs(attempts[-1].believed - price) <= NEAR * price or weight >= HIGHEST:
            break
        weight = next_weight(price, attempts)
    kept = [one for one in attempts if one.believed <= (1 + NEAR) * price]
    best = max(kept, key=lambda one: one.weight) if kept else min(attempts, key=lambda one: one.believed)
    if best.network is None or best.lost - 2 * best.error > price + RUINED:
        raise ModelError(
            f"Even with omega {min(one.weight for one in attempts):.2g}, training on costs {best.lost:.1f} points of "
            f"accuracy, and the price is {price:g}. Lower recipe.lr, or name a smaller omega instead of a price."
        )
    if 1.96 * best.error > price:
        remark(
            f"The {len(samples)} validation images measure an accuracy to ± {1.96 * best.error:.1f} points, and the "
            f"price is {price:g}: it is kept by experience with other data, too. More validation images mend that."
        )
    fit.choose(best.history)
    fit.found["omega"] = best.weight
    return best.network


def tries(epochs: int) -> int:
    """How many trainings fit into one and a half times the epochs of a recipe: at most three, and at least one."""
    return max(min(math.floor(1.5 * epochs / math.ceil(SHARE * epochs)), TRIES), 1)


def next_weight(price: float, attempts: Sequence[Attempt]) -> float:
    """The weight of the next attempt: between the nearest ones that cost less and more, or beyond all of them."""
    less = max((one for one in attempts if one.believed < price), key=lambda one: one.weight, default=None)
    more = min((one for one in attempts if one.believed >= price), key=lambda one: one.weight, default=None)
    if less and more and less.weight < more.weight:
        share = (price - less.believed) / (more.believed - less.believed)
        # at least a tenth of the way from both, since a measured end may be off
        squares = less.weight**2, more.weight**2
        return math.sqrt(squares[0] + min(max(share, 0.1), 0.9) * (squares[1] - squares[0]))
    if more:
        return more.weight * max(math.sqrt(price / more.believed), 1 / DOWN)
    assert less
    rise = math.sqrt(price / less.at_most) if less.at_most > 0 else math.inf
    far = FAR[len(attempts) > 1]
    return min(less.weight * min(max(rise, UP), far), HIGHEST)
