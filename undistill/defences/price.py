"""A price instead of a weight: training finds the weight of the undermining term by itself.

The owner states how much accuracy he accepts to lose. In each training the weight rises while the network's
cross-entropy is within a slack of the unprotected one's, and falls while it is not: dual ascent on its logarithm. The
slack follows from the price, and is corrected by what validation images say was lost. See docs/price.md.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from undistill.core import distributed
from undistill.core.errors import ModelError
from undistill.data.split import Split
from undistill.defences.defence import Fresh
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy_lost, evaluate
from undistill.training.objectives import Objective

NATS = 6.0  # of slack for each share of accuracy, as long as validation images do not say otherwise
SHARES = 0.75, 0.375, 0.375  # of the recipe's epochs for each training, one and a half in all
NEAR = 0.25  # of the price: what is believed to be lost may differ by so much
RUINED = 0.02  # of accuracy, surely lost beyond the price
FURTHEST = 4.0  # factor by which a slack is corrected
START, LOWEST, HIGHEST = 0.01, 1e-6, 1.0  # of the weight
RATE = 0.02  # of the weight's logarithm in a step, at most


class FoundWeight:
    """A weight that rises while a constraint holds and falls while it is broken; carried in checkpoints."""

    def __init__(self, slack: float, device: torch.device, start: float = START) -> None:
        self.slack = slack
        self.log = torch.tensor(math.log(start), device=device)

    @torch.no_grad()
    def __call__(self, excess: Tensor, images: int) -> Tensor:
        """The weight in this step, a scalar, under the constraint that the mean of `excess` is at most the slack.

        `excess` is the mean over the `images` that this process has of the batch.
        """
        weight = self.log.exp()
        total = distributed.all_reduce(torch.stack([excess * images, torch.full_like(excess, images)]))
        excess = total[0] / total[1]
        held = ((self.slack - excess) / self.slack).clamp(-1, 1)
        self.log = (self.log + RATE * held).clamp(math.log(LOWEST), math.log(HIGHEST))
        return weight

    @property
    def value(self) -> float:
        return float(self.log.exp())

    def state_dict(self) -> dict[str, Any]:
        return {"log": self.log}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.log = state["log"].to(self.log)


@dataclass(frozen=True)
class Attempt:
    """One training with a slack, and the share of accuracy that it lost on validation images, with standard error."""

    network: nn.Module
    slack: float
    weight: float
    lost: float
    error: float

    @property
    def believed(self) -> float:
        """The share that is believed to be lost: what was measured, and where that is noise, what the slack suggests.

        The suggestion is believed up to half of itself (one standard deviation), but not against two standard errors.
        """
        suggested = self.slack / NATS
        trust = (suggested / 2) ** 2 / ((suggested / 2) ** 2 + self.error**2)
        return max(trust * self.lost + (1 - trust) * suggested, self.least)

    @property
    def least(self) -> float:
        """The least share that was lost, two standard errors below the measured one."""
        return self.lost - 2 * self.error


def at_price(
    price: float,
    current: nn.Module,
    fresh: Fresh,
    data: Split,
    fit: Fit,
    objective: Callable[[FoundWeight], Objective],
    bounds: Mapping[str, float],
) -> nn.Module:
    """Train `current` on until it loses about the share `price` of its accuracy; the network that comes nearest.

    At most three trainings, each from where the last one ended, take one and a half times the recipe's epochs. Raises
    `ModelError` where all of them cost far more than the price: it is not undermining that costs so much, but training.
    """
    samples = data.validation
    before = evaluate(current, samples).cpu()
    attempts: list[Attempt] = []
    slack, weight, state = NATS * price, START, current.state_dict()
    for share in SHARES:
        network, found = fresh(), FoundWeight(slack, fit.device, weight)
        network.load_state_dict(state)
        epochs = math.ceil(share * fit.recipe.epochs)
        network = fit(
            network,
            data,
            objective(found),
            epochs=epochs,
            carried=[found],
            choose=False,
            continues=bool(attempts),
            bounds=bounds,
        )
        lost, error = accuracy_lost(evaluate(network, samples).cpu(), before, samples.labels)
        attempts.append(Attempt(network, slack, found.value, lost, error))
        believed = attempts[-1].believed
        if abs(believed - price) <= NEAR * price:
            break
        slack *= min(max(price / believed, 1 / FURTHEST), FURTHEST) if believed > 0 else FURTHEST
        weight, state = found.value, network.state_dict()
    best = min(attempts, key=lambda one: abs(one.believed - price))
    if best.least > price + RUINED:
        raise ModelError(
            f"Training on costs {100 * best.lost:.1f} points of accuracy, however little it undermines, and the price "
            f"is {100 * price:g}. Lower recipe.lr, or train the unprotected network for longer first."
        )
    fit.found |= {"omega": best.weight, "slack": best.slack}
    return best.network
