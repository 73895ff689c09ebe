"""How a network that was trained elsewhere wants its images: named by the user, or found by trying the usual ways."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from undistill.core.errors import ModelError, NonFinite, SpecError, unknown
from undistill.data.split import Data, Samples
from undistill.models.adapter import Adapted, Adapter
from undistill.training.metrics import evaluate

NORMALISATIONS: dict[str, Adapter] = {
    "none": Adapter(),
    "imagenet": Adapter(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "half": Adapter(mean=(0.5,), std=(0.5,)),
    "cifar10": Adapter(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
    "mnist": Adapter(mean=(0.1307,), std=(0.3081,)),
    "255": Adapter(mean=(0.0,), std=(1 / 255,)),
}
"""Usual ways to normalise images. `half` brings them to [-1, 1], `255` to [0, 255]."""
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
    """A normalisation and an order of outputs, and the share of images that the network then recognises."""

    accuracy: float
    normalisation: str
    """Empty stands for the one that was named."""
    order: tuple[int, ...]
    """The output of the network for each class of the data."""


def better_way(network: nn.Module, adapter: Adapter, data: Data) -> str:
    """The usual normalisation, and the order of classes, with which the network does clearly better, as advice."""
    samples, usual = some(data.train), tuple(range(data.num_classes))
    now = _right(_confusion(network, adapter, data, samples), usual)
    adapter = adapter.model_copy(update={"order": ()})
    ways = sorted(_ways(network, adapter, data, samples), key=lambda way: -way.accuracy)
    plain = [way for way in ways if way.order == usual]
    # an order that was fitted to these very images wins by luck unless it is much better
    best = ways[0] if ways[0].accuracy > plain[0].accuracy + CLEAR else plain[0]
    if best.accuracy < now + CLEAR:
        return "No usual normalisation or order of classes fits; is it the network of these images?"
    named = sorted(data.classes, key=lambda name: best.order[data.classes.index(name)])
    classes = "" if best.order == usual else f"--classes {','.join(named)}"
    normalisation = f"--preprocess {best.normalisation}" if best.normalisation else ""
    changed = " ".join(filter(None, (normalisation, classes))) or "classes in the usual order"
    return f"With {changed} it is {best.accuracy:.1%} on {len(samples)} images; try that, in another --out."


def _ways(network: nn.Module, adapter: Adapter, data: Data, samples: Samples) -> Iterator[Way]:
    """Each usual normalisation, with the outputs in their order, and in that which fits best."""
    from scipy.optimize import linear_sum_assignment

    usual = tuple(range(data.num_classes))
    for name, one in {"": adapter, **NORMALISATIONS}.items():
        if len(one.mean) not in (0, 1, data.shape[0]):
            continue
        tried = adapter.model_copy(update={"mean": one.mean, "std": one.std})
        counts = _confusion(network, tried, data, samples)
        fitted = tuple(linear_sum_assignment(-counts)[1].tolist())
        yield from (Way(_right(counts, order), name, order) for order in dict.fromkeys((usual, fitted)))


def _right(counts: Tensor, order: Sequence[int]) -> float:
    """Share of images that are recognised if class k is output `order[k]`."""
    return float(counts[torch.arange(len(counts)), torch.tensor(order)].sum() / counts.sum())


def _confusion(network: nn.Module, adapter: Adapter, data: Data, samples: Samples) -> Tensor:
    """How many images of each class (row) have each output (column) highest, (K, K)."""
    logits, classes = evaluate(adapter.wrap(network, data.shape[0], data.num_classes), samples), data.num_classes
    pairs = samples.labels.to(logits.device) * classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
