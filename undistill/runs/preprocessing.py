"""How a network that was trained elsewhere wants its images: named by the user, or found by trying the usual ways."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from undistill.core.errors import ModelError, NonFinite, SpecError, unknown
from undistill.data.split import Data, Samples
from undistill.models.adapter import NORMALISATIONS, Adapted, Adapter
from undistill.training.metrics import evaluate

TRIED = 500  # images on which another normalisation or order of classes is tried
CLEAR = 0.2  # share of images by which another way must be better to be named


def adapter_of(preprocess: str | Adapter, network: nn.Module) -> Adapter:
    """The adapter that the user named; `timm` reads it from the network."""
    if isinstance(network, Adapted):  # by timm:NAME
        if preprocess not in ("none", "timm"):
            raise SpecError(f"Networks of timm: normalise images by themselves; leave out --preprocess {preprocess}.")
        return Adapter()
    if isinstance(preprocess, Adapter):
        return preprocess
    if preprocess == "timm":
        wanted = getattr(network, "pretrained_cfg", None) or {}
        if not {"mean", "std"} <= set(wanted):
            raise ModelError("The network has no pretrained_cfg of timm that says mean and std; name them.")
        return Adapter(mean=tuple(wanted["mean"]), std=tuple(wanted["std"]))
    if preprocess not in NORMALISATIONS:
        raise SpecError(unknown("preprocessing", preprocess, [*NORMALISATIONS, "timm"]))
    return NORMALISATIONS[preprocess]


def order_of(named: Sequence[str], classes: Sequence[str]) -> tuple[int, ...]:
    """The output of the network for each class of the data, from the classes in the order of its outputs."""
    if sorted(named) != sorted(classes):
        unlike = sorted(set(named) ^ set(classes))
        raise SpecError(f"classes must name all {len(classes)} classes of the data once; see {', '.join(unlike[:3])}.")
    return tuple(named.index(name) for name in classes)


def answers_probabilities(network: nn.Module, data: Data) -> bool:
    """Whether what the network answers are probabilities, as if it ended with a softmax."""
    try:
        answers = evaluate(network, some(data.validation))
    except NonFinite:  # which is said where it is measured
        return False
    return bool((answers >= 0).all() and ((answers.sum(1) - 1).abs() < 1e-3).all())


def some(samples: Samples) -> Samples:
    """A few hundred of them, always the same."""
    index = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:TRIED]
    return samples[index]


class Way(NamedTuple):
    """A normalisation and an order of outputs, and the share of images that are then recognised."""

    accuracy: float
    normalisation: str
    """Empty stands for the one that was named."""
    order: tuple[int, ...]
    """The output for each class of the data."""


Answers = Callable[[Adapter], Tensor]
"""Numbers (N, K), in the order of the outputs, that the same N images get when they are normalised in that way."""


def better_way(answers: Answers, adapter: Adapter, labels: Tensor, channels: int) -> Way | None:
    """The usual normalisation and the order of classes that are clearly better than `adapter` on a few images.

    None where no usual way is.
    """
    usual = tuple(range(answers(adapter.model_copy(update={"order": ()})).shape[1]))
    now = _right(_confusion(answers(adapter), labels), usual)
    adapter = adapter.model_copy(update={"order": ()})
    ways = sorted(_ways(answers, adapter, labels, channels), key=lambda way: -way.accuracy)
    plain = [way for way in ways if way.order == usual]
    # an order that was fitted to these very images wins by luck unless it is much better
    best = ways[0] if ways[0].accuracy > plain[0].accuracy + CLEAR else plain[0]
    return best if best.accuracy >= now + CLEAR else None


def named_order(order: Sequence[int], classes: Sequence[str]) -> list[str]:
    """The classes of the data in the order of the outputs."""
    return sorted(classes, key=lambda name: order[classes.index(name)])


def _ways(answers: Answers, adapter: Adapter, labels: Tensor, channels: int) -> Iterator[Way]:
    """Each usual normalisation, with the outputs in their order, and in that which fits best."""
    from scipy.optimize import linear_sum_assignment

    for name, one in {"": adapter, **NORMALISATIONS}.items():
        if len(one.mean) not in (0, 1, channels):
            continue
        counts = _confusion(answers(adapter.model_copy(update={"mean": one.mean, "std": one.std})), labels)
        fitted = tuple(linear_sum_assignment(-counts)[1].tolist())
        usual = tuple(range(len(counts)))
        yield from (Way(_right(counts, order), name, order) for order in dict.fromkeys((usual, fitted)))


def _right(counts: Tensor, order: Sequence[int]) -> float:
    """Share of images that are recognised if class k is output `order[k]`."""
    return float(counts[torch.arange(len(counts)), torch.tensor(order)].sum() / counts.sum())


def _confusion(answers: Tensor, labels: Tensor) -> Tensor:
    """How many images of each class (row) have each output (column) highest, (K, K)."""
    classes = answers.shape[1]
    pairs = labels.to(answers.device) * classes + answers.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
