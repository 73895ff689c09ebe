"""The optimiser, its learning rate, and averaged weights, as a recipe asks for them."""

from copy import deepcopy
from typing import Any

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
from undistill.training.recipe import Recipe


def build_optimiser(network: nn.Module, recipe: Recipe) -> Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise ModelError(
            "The network has no trainable parameter (requires_grad is False on all); nothing can be learnt."
        )
    fused = parameters[0].is_cuda
    if recipe.optimiser == "adamw":
        betas = (recipe.momentum, 0.999)
        return AdamW(parameters, recipe.lr, betas, weight_decay=recipe.weight_decay, fused=fused)
    return SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=fused)


def build_schedule(optimiser: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The learning rate of every step."""
    rise = round(recipe.warmup * steps)
    if recipe.schedule == "one_cycle":
        share = max(rise, 1) / steps
        return OneCycleLR(optimiser, recipe.lr, total_steps=steps + 1, pct_start=share, cycle_momentum=False)
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
