"""`Model`: the one factory of networks, and what every network must be."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from undistill.core.code import is_code, reference
from undistill.core.errors import ModelError, Unsuitable, unknown
from undistill.core.seeds import seeded
from undistill.core.spec import Spec
from undistill.models.trial import Shape, check


class Model(Spec):
    """An architecture: `ConvNet(width=32)`, or the user's own as `file.py:factory`."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a spec; `file.py:factory(...)` becomes a `Factory`, `timm:NAME` a network of timm."""
        if text.strip().startswith("timm:"):
            return cls._find("Timm")(name=text.strip().removeprefix("timm:"))  # type: ignore[call-arg]
        return cls._find("Factory")(call=text) if is_code(text) else super().parse(text)  # type: ignore[call-arg]

    @classmethod
    def from_user(cls, spec: "str | Self | nn.Module | Callable[..., nn.Module]") -> Self:
        """A spec that the user typed or made himself, a network, or a function that makes one: its code may run."""
        if isinstance(spec, nn.Module):
            given: Self = cls._find("Given").of(spec)  # type: ignore[attr-defined]
            return given
        return super().from_user(spec if isinstance(spec, str | Model) else reference(spec))

    @abstractmethod
    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        """A new network for images of `shape`."""

    def stages(self, network: nn.Module) -> Sequence[nn.Module]:
        """The parts of a network of ours after which its feature maps can be read, from the input to the output.

        A network of the user's own names them: `network.stages = ["layer1", "layer2"]`. `Unsuitable` where there are
        none.
        """
        named = getattr(network, "stages", None)
        if not isinstance(named, list | tuple) or not named:
            raise Unsuitable(
                f"{self} names no stages, which this attack reads. Give the network an attribute that names them, such "
                "as network.stages = ['layer1', 'layer2']."
            )
        parts = dict(network.named_modules())
        if missing := [name for name in named if name not in parts]:
            raise ModelError(unknown(f"part of {self}", str(missing[0]), parts))
        return [parts[name] for name in named]

    def build(self, shape: Shape, num_classes: int, seed: int) -> nn.Module:
        """A network initialised by `seed`, tried on two blank images; `ModelError` if it is no classifier."""
        with seeded(seed):
            try:
                network = self.network(shape, num_classes)
                _materialise(network, shape)
            except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
                raise ModelError(f"{self} cannot be built: {str(error).splitlines()[0]}") from None
            check(network, shape, num_classes, str(self))
        return network


def _materialise(network: nn.Module, shape: Shape) -> None:
    """Give lazy layers, which take their sizes from the first images that they see, their weights."""
    if isinstance(network, nn.Module) and any(map(nn.parameter.is_lazy, network.parameters())):
        with torch.no_grad():
            network.eval()(torch.zeros(2, *shape))
        network.train()


def frozen(network: nn.Module) -> nn.Module:
    """The network in eval mode, its parameters without gradient."""
    return network.eval().requires_grad_(False)


def last_layer(network: nn.Module) -> nn.Linear | None:
    """The last linear layer of a network, which makes logits of features; None if it has none."""
    return next((module for module in [*network.modules()][::-1] if isinstance(module, nn.Linear)), None)


@contextlib.contextmanager
def last_features(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds, after each call of the network, the inputs of its last linear layer, if it has one."""
    layer = last_layer(network)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) if layer else None
    try:
        yield seen
    finally:
        if handle:
            handle.remove()


def features(network: nn.Module, images: Tensor) -> Tensor | None:
    """Inputs (B, D) of the network's last linear layer, or None where there are none, one row per image."""
    with last_features(network) as seen, torch.no_grad():
        network(images)
    return seen[-1].flatten(1) if seen and len(seen[-1]) == len(images) else None
