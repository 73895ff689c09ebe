"""Objectives: what a training minimises, as named terms."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from undistill.data.batches import Batch


class Weighted(NamedTuple):
    """A term that counts `weight` times in the loss. The record of the training shows it without its weight."""

    value: Tensor
    weight: float


Terms = Mapping[str, Tensor | Weighted]
"""Scalars by name; the loss is their sum."""


Objective = Callable[[nn.Module, Batch], Terms]
"""From the network in training and a batch to the terms of the loss."""
