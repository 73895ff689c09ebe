"""The skeptical student (Kundu et al., NeurIPS 2021)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Fresh, QueryAttack, Role, tries
from undistill.core.errors import Unsuitable
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.models.trial import device_of
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation, kl
from undistill.training.objectives import Terms, Weighted
from undistill.training.optimisers import Extra
from undistill.victims.oracle import Oracle


class Skeptical(QueryAttack):
    """Only a shallow head imitates the victim; the student's own answer learns from labels, and teaches deeper heads.

    The trunk gains from the victim what its first stage can use, and the output never sees a poisoned answer. Heads
    are dropped at the end. With `alpha=0` no answer counts: the control, which has the same heads.
    """

    role = Role.ADAPTIVE
    space = tries(T=(1.0, 4.0, 20.0), alpha=(0.1, 0.5, 0.9))
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)
    """Weight of imitation against labels, at the shallow head."""
    own: float = Field(0.3, ge=0, le=1)
    """Weight of KL between a deeper head and the output, into both, against labels at that head."""
    wait: float = Field(0.05, ge=0, le=1)
    """Share of the epochs in which only the output learns."""

    def check(self, victim: nn.Module | None, fresh: Fresh) -> None:
        if len(fresh.stages(fresh())) < 2:
            raise Unsuitable(
                "A skeptical student needs a head before its last stage, and this network names a single one. Give it "
                "more: network.stages = ['layer1', 'layer2']."
            )

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        student, ask = fresh(), self.asking(oracle, data)
        stages = fresh.stages(student)[:-1]
        heads = Heads(student, stages, data)
        first = self.wait * fit.recipe.epochs

        def objective(network: nn.Module, batch: Batch) -> Terms:
            logits = network(batch.images)
            shallow, *deeper = heads()
            deep, on = deeper[0] if deeper else shallow, float(batch.epoch >= first)
            soft = distillation(ask(batch).filled, shallow, self.T)
            return {
                "ce": cross_entropy(logits, batch.labels),
                "soft": Weighted(soft, on * self.alpha),
                "shallow": Weighted(cross_entropy(shallow, batch.labels), on * (1 - self.alpha)),
                "own": Weighted(kl(deep, logits, self.T), on * self.own),
                "deep": Weighted(cross_entropy(deep, batch.labels), on * (1 - self.own)),
            }

        with heads.reading(stages):
            return fit(student, data, objective, extra=[Extra(heads)])


class Heads(nn.Module):
    """A classifier on the feature maps after each of some stages of a network."""

    def __init__(self, network: nn.Module, stages: Sequence[nn.Module], data: Split) -> None:
        super().__init__()
        self._maps: dict[int, Tensor] = {}
        device = device_of(network)
        with self.reading(stages), torch.no_grad():
            deepcopy(network).eval()(torch.zeros(2, *data.shape, device=device))
        self.heads = nn.ModuleList(head(self._maps[number], data.num_classes) for number in range(len(stages)))

    def forward(self) -> list[Tensor]:
        """Logits (B, K) after each stage, for the images that the network saw last."""
        return [head(self._maps[number]) for number, head in enumerate(self.heads)]

    @contextmanager
    def reading(self, stages: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, the maps after the stages are kept whenever the network is called."""
        maps = self._maps

        def keep(number: int) -> Callable[..., None]:  # a plain function: copies of the network share it
            return lambda _, __, output: maps.__setitem__(number, output)

        handles = [stage.register_forward_hook(keep(number)) for number, stage in enumerate(stages)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def head(maps: Tensor, num_classes: int) -> nn.Module:
    """A convolution and a linear layer for maps (B, C, H, W); a linear layer for features (B, D), or tokens (B, N, D).

    `maps` is an example of what it will see.
    """
    if maps.ndim == 3:
        return nn.Sequential(Mean(), nn.Linear(maps.shape[2], num_classes))
    if maps.ndim != 4:
        return nn.Sequential(nn.Flatten(), nn.Linear(maps[0].numel(), num_classes))
    channels = maps.shape[1]
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(), *pooled)


class Mean(nn.Module):
    """The mean of tokens (B, N, D) over N."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)
