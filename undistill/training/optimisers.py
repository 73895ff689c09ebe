"""Optimisers with their learning rates, and averaged weights, as a recipe asks for them."""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from undistill.core.errors import ModelError
from undistill.core.tensors import same_form
from undistill.training.captured import each_step
from undistill.training.recipe import Recipe

ADAM_LR = 1e-3


@dataclass(frozen=True)
class Extra:
    """A module that is trained beside the network: auxiliary heads, a matrix, a generator, another student."""

    module: nn.Module
    optimiser: Literal["same", "adam", "sgd"] = "same"
    """`same` joins the network's own optimiser; the others get one of their own, with the recipe's schedule."""
    lr_scale: float = 1.0
    """Factor of the recipe's learning rate; with `adam`, of 1e-3."""
    decay: float | None = None
    """Weight decay; None is the recipe's."""


class Trained:
    """An optimiser and its schedule: of the network with those extras that join it, or of one other extra."""

    def __init__(self, network: nn.Module | None, extras: Sequence[Extra], recipe: Recipe, steps: int) -> None:
        self._made_of = network, extras, recipe, steps
        groups: list[dict[str, Any]] = [{"params": _trainable(network)}] if network else []
        kind = "same" if network else extras[0].optimiser
        base = ADAM_LR if kind == "adam" else recipe.lr
        for extra in extras:
            decay = recipe.weight_decay if extra.decay is None else extra.decay
            groups.append({"params": _trainable(extra.module), "lr": base * extra.lr_scale, "weight_decay": decay})
        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self.optimiser = _build(groups, recipe, recipe.optimiser if kind == "same" else kind, base)
        self.schedule = build_schedule(self.optimiser, recipe, steps)

    def clip(self, norm: float) -> None:
        """Shorten the gradient of all its parameters to `norm`; 0 leaves it alone."""
        if norm:
            nn.utils.clip_grad_norm_(self.parameters, norm)

    def step(self) -> None:
        self.optimiser.step()
        each_step(self.schedule.step)

    def state_dict(self) -> dict[str, Any]:
        return {"optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])

    def could_be(self, state: Mapping[str, Any], steps: int) -> bool:
        """Whether `state` has the form that ours would have after so many steps.

        The schedule depends on the number of steps alone; it, and what it sets in the optimiser, must be what we would
        have come to ourselves.
        """
        twin = Trained(*self._made_of)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the optimiser itself makes no step
            for _ in range(steps):
                twin.schedule.step()
        ours = twin.state_dict()
        same_groups = state["optimiser"]["param_groups"] == ours["optimiser"]["param_groups"]
        return same_groups and state["schedule"] == ours["schedule"] and self._moments_fit(state["optimiser"]["state"])

    def _moments_fit(self, kept: Mapping[int, Mapping[str, Any]]) -> bool:
        """Whether what an optimiser keeps of each parameter has the names and shapes that its kind has."""
        adam = {"step": torch.zeros(()), "exp_avg": None, "exp_avg_sq": None}
        names: Mapping[str, Any] = adam if isinstance(self.optimiser, AdamW) else {"momentum_buffer": None}
        momentum = self.optimiser.defaults.get("momentum")
        for number, held in kept.items():
            parameter = self.parameters[number].detach()
            expected = {name: parameter if like is None else like for name, like in names.items()}
            if not same_form({name: value for name, value in held.items() if value is not None}, expected):
                return bool(not momentum and held == {"momentum_buffer": None})
        return True


def build_trained(network: nn.Module, extras: Sequence[Extra], recipe: Recipe, steps: int) -> list[Trained]:
    """The network's optimiser, then one for each extra that has its own."""
    joined = [extra for extra in extras if extra.optimiser == "same"]
    own = [extra for extra in extras if extra.optimiser != "same"]
    return [Trained(network, joined, recipe, steps), *(Trained(None, [extra], recipe, steps) for extra in own)]


def _trainable(network: nn.Module) -> list[Tensor]:
    parameters: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise ModelError(
            f"{type(network).__name__} has no trainable parameter (requires_grad is False on all); nothing can be "
            "learnt."
        )
    return parameters


def _build(groups: list[dict[str, Any]], recipe: Recipe, kind: str, lr: float) -> Optimizer:
    fused = groups[0]["params"][0].is_cuda
    if kind in ("adam", "adamw"):
        betas = (recipe.momentum, 0.999)
        return AdamW(groups, lr, betas, weight_decay=recipe.weight_decay, fused=fused)
    return SGD(groups, lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=fused)


def build_schedule(optimiser: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The learning rate of every step, each group from its own."""
    rise = round(recipe.warmup * steps)
    if recipe.schedule == "one_cycle":
        share = max(rise, 1) / steps
        highest = [group["lr"] for group in optimiser.param_groups]
        return OneCycleLR(optimiser, highest, total_steps=steps + 1, pct_start=share, cycle_momentum=False)
    main: LRScheduler
    if recipe.schedule == "cosine":
        main = CosineAnnealingLR(optimiser, max(steps - rise, 1))
    else:
        main = MultiStepLR(optimiser, [max(round(drop * steps) - rise, 0) for drop in recipe.drops], recipe.gamma)
    if not rise:
        return main
    return SequentialLR(optimiser, [LinearLR(optimiser, 1 / rise, total_iters=rise), main], [rise])


class Average:
    """Exponentially averaged weights and buffers; unlike torch's own, no update waits for a GPU."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = deepcopy(network)
        self.decay = decay
        self.started = False

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        pairs = list(zip(tensors_of(self.module), tensors_of(network), strict=True))
        for own, new in pairs:
            if self.started and own.is_floating_point():
                own.lerp_(new, 1 - self.decay)
            else:
                own.copy_(new)
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "started": self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.started = state["started"]


def tensors_of(network: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*network.parameters(), *network.buffers()]
