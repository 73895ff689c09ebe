"""Between images in [0, 1] and a network that wants others, and between its answers and logits."""

from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from undistill.core.errors import ModelError
from undistill.core.spec import Spec

NETWORK = "network."
LEAST = 1e-12  # probability that is told from 0


class Adapter(Spec):
    """How a network that was trained elsewhere is asked, and how its answers are read."""

    mean: tuple[float, ...] = ()
    """Of each channel, subtracted from images in [0, 1]; one value holds for all channels."""
    std: tuple[float, ...] = ()
    """Of each channel, by which images are then divided."""
    probabilities: bool = False
    """Whether the network answers probabilities, which are read as their logarithms."""
    order: tuple[int, ...] = ()
    """The network's output for each class, where it counts the classes in another order than the data."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise ValueError("mean and std must have as many values, and std be above 0")
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError("order must name every output once, counted from 0")
        return self

    def normalised(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] as the network wants them."""
        if not self.mean:
            return images
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def wrap(self, network: nn.Module, channels: int, num_classes: int) -> nn.Module:
        """`network` as it is to be asked; its weights keep their names."""
        if self == Adapter():
            return network
        if self.mean and len(self.mean) not in (1, channels):
            raise ModelError(f"mean and std have {len(self.mean)} values; images have {channels} channels.")
        if self.order and len(self.order) != num_classes:
            raise ModelError(f"order names {len(self.order)} outputs of a network with {num_classes}.")
        return Adapted(network, self)


NORMALISATIONS: dict[str, Adapter] = {
    "none": Adapter(),
    "imagenet": Adapter(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "half": Adapter(mean=(0.5,), std=(0.5,)),
    "cifar10": Adapter(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
    "mnist": Adapter(mean=(0.1307,), std=(0.3081,)),
    "255": Adapter(mean=(0.0,), std=(1 / 255,)),
}
"""Usual ways to normalise images. `half` brings them to [-1, 1], `255` to [0, 255]."""


class Adapted(nn.Module):
    """A network behind an `Adapter`. Its state dict is the network's own."""

    mean: Tensor | None
    std: Tensor | None
    order: Tensor | None

    def __init__(self, network: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.network, self.probabilities = network, adapter.probabilities
        for name, values in (("mean", adapter.mean), ("std", adapter.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1) if values else None, persistent=False)
        self.register_buffer("order", torch.tensor(adapter.order) if adapter.order else None, persistent=False)
        if named := getattr(network, "stages", None):
            self.stages = [NETWORK + name for name in named]
        self.register_state_dict_post_hook(_without_our_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_our_prefix)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        answers: Tensor = self.network(images)
        if self.probabilities:
            answers = answers.clamp_min(LEAST).log()
        return answers if self.order is None else answers[:, self.order]


def _without_our_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + NETWORK)]:
        state[prefix + name.removeprefix(prefix + NETWORK)] = state.pop(name)


def _with_our_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + NETWORK + name.removeprefix(prefix)] = state.pop(name)
