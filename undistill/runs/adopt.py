"""`adopt`: from weights that were trained elsewhere to a run folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from undistill.core.errors import ModelError, SpecError, remark
from undistill.core.files import sha256
from undistill.core.seeds import derive
from undistill.data.apart import Apart
from undistill.data.source import Source
from undistill.data.split import Data, Samples
from undistill.models.adapter import Adapter
from undistill.models.model import Model
from undistill.models.trial import require_whole
from undistill.models.weights import largest_weights, load_weights, read_state
from undistill.runs.folder import claim, together
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.runs.train import record_of
from undistill.training.compute import pick_device
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy, confidence, evaluate
from undistill.training.recipe import Recipe

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
CLEAR = 0.2  # points of accuracy, of 1, by which another way must be better to be named
MEMORY = 0.1  # by which accuracy on training images may exceed that on others without a word


def adopt(
    model: str | Model | Callable[..., nn.Module],
    data: str | Source,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    key: str | None = None,
    preprocess: str | Adapter = "none",
    classes: Sequence[str] = (),
    test: str | Source | None = None,
    device: str = "auto",
) -> Run:
    """Take a trained classifier as it is; its run folder is that of an honest teacher.

    Args:
        model: a listed network, or the user's own: a function that makes it, or `file.py:factory`.
        data: images of the kind that it was trained on. Which of them it has seen is not known.
        out: the run folder. It keeps the weights under the network's own names.
        weights: safetensors, or a checkpoint of torch; None where the factory loads them by itself.
        key: where the checkpoint keeps them, if it holds several.
        preprocess: how the network wants its images: none, imagenet, half, cifar10, mnist, 255, timm, or an `Adapter`.
        classes: the classes in the order of the network's outputs, where that is not the order of the data.
        test: images that the network has not seen, on which everything is then measured.
        device: auto, cpu, cuda or cuda:N.
    """
    source, spec = Source.from_user(data), Model.from_user(model)
    if test is not None:
        source = Apart(of=str(source), test_on=str(Source.from_user(test)))
    if weights is not None:
        read_state(Path(weights), key=key)  # what cannot be read is said before images are
    loaded, seed, chosen = source.load(), derive(0, "honest"), pick_device(device)
    bare, other = (spec.build(loaded.shape, loaded.num_classes, seed + number) for number in range(2))
    require_whole(bare, other, loaded.shape, str(spec))
    start = None
    if weights is not None:
        load_weights(bare, Path(weights), key)
        start = sha256(Path(weights), largest_weights(bare))
    adapter = _adapter(preprocess, bare)
    if classes:
        adapter = adapter.model_copy(update={"order": _order(classes, loaded.classes)})
    if _answers_probabilities(bare, adapter, loaded):
        remark(f"{spec} answers probabilities; they are read as such, by their logarithms.")
        adapter = adapter.model_copy(update={"probabilities": True})
    settings = TrainSettings(recipe=Recipe(epochs=0))
    request = {
        "command": "adopt",
        "data": str(source),
        "data_sha256": loaded.digest,
        "model": str(spec),
        "adapter": str(adapter),
        "start_sha256": start,
        "refers": spec.refers(),
        "settings": settings.model_dump(mode="json"),
    }
    network = adapter.wrap(bare, loaded.shape[0]).to(chosen).eval()
    with together(chosen, request), claim(Path(out), request) as place:
        if not place.finished:
            fit = Fit(settings.recipe, seed, chosen)
            record = record_of(request, loaded, fit, network, str(weights or spec))
            record["metrics"] |= _measured(network, loaded)
            record["unseen"] = "test" if test is not None else None
            place.finish(network, record, adapter.wrap(other, loaded.shape[0]), loaded.validation)
            _doubts(bare.to(chosen), adapter, loaded, record["metrics"])
    return Run.open(out)


def _adapter(preprocess: str | Adapter, network: nn.Module) -> Adapter:
    if isinstance(preprocess, Adapter):
        return preprocess
    if preprocess == "timm":
        wanted = getattr(network, "pretrained_cfg", None) or {}
        if not {"mean", "std"} <= set(wanted):
            raise ModelError("The network has no pretrained_cfg of timm that says mean and std; name them.")
        return Adapter(mean=tuple(wanted["mean"]), std=tuple(wanted["std"]))
    if preprocess not in NORMALISATIONS:
        raise SpecError(f"No preprocessing named '{preprocess}'. Valid: {', '.join(NORMALISATIONS)}, timm.")
    return NORMALISATIONS[preprocess]


def _order(named: Sequence[str], classes: Sequence[str]) -> tuple[int, ...]:
    """The output of the network for each class of the data."""
    if sorted(named) != sorted(classes):
        unlike = sorted(set(named) ^ set(classes))
        raise SpecError(f"classes must name all {len(classes)} classes of the data once; see {', '.join(unlike[:3])}.")
    return tuple(named.index(name) for name in classes)


def _answers_probabilities(network: nn.Module, adapter: Adapter, data: Data) -> bool:
    answers = evaluate(adapter.wrap(network, data.shape[0]), _some(data.validation))
    return bool((answers >= 0).all() and ((answers.sum(1) - 1).abs() < 1e-3).all())


def _some(samples: Samples) -> Samples:
    index = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:TRIED]
    return samples[index]


def _measured(network: nn.Module, data: Data) -> dict[str, float]:
    """Accuracy and mean confidence on training images, and on those that are held out."""
    found = {}
    for name, samples in (("train", _some(data.train)), ("test", data.test)):
        logits = evaluate(network, samples)
        found[f"{name}_accuracy"] = accuracy(logits, samples.labels.to(logits.device))
        found[f"{name}_confidence"] = confidence(logits)
    return found


def _doubts(network: nn.Module, adapter: Adapter, data: Data, measured: dict[str, float]) -> None:
    """Say what looks wrong: accuracy near chance, and what would mend it; training images that are known by heart."""
    chance = max(torch.bincount(data.test.labels, minlength=data.num_classes).tolist()) / len(data.test)
    if measured["test_accuracy"] < chance + 0.1 * (1 - chance):
        remark(f"Accuracy is near chance ({measured['test_accuracy']:.1%}). {_better(network, adapter, data)}")
    elif measured["train_accuracy"] > measured["test_accuracy"] + MEMORY:
        remark(
            f"Accuracy is {measured['train_accuracy']:.1%} on training images, {measured['test_accuracy']:.1%} on test "
            "images: the network knows many of the former by heart."
        )


def _better(network: nn.Module, adapter: Adapter, data: Data) -> str:
    """The normalisation or order of classes that fits, among the usual ones."""
    samples = _some(data.train)
    ways = {
        f"--preprocess {name}": one for name, one in NORMALISATIONS.items() if len(one.mean) in (0, 1, data.shape[0])
    }
    best, way, order = 0.0, "", list(range(data.num_classes))
    now = 0.0
    for name, one in ways.items():
        tried = adapter.model_copy(update={"mean": one.mean, "std": one.std})
        counts = _confusion(evaluate(tried.wrap(network, data.shape[0]), samples), samples.labels)
        rows, outputs = linear_sum_assignment(-counts)
        right = float(counts.diagonal().sum()) / len(samples)
        now = right if (one.mean, one.std) == (adapter.mean, adapter.std) else now
        permuted = float(counts[rows, outputs].sum()) / len(samples)
        if right > best + CLEAR / 4:
            best, way, order = right, name, list(range(data.num_classes))
        if permuted > best + CLEAR:
            best, way, order = permuted, name, outputs.tolist()
    if best < now + CLEAR:
        return "No usual normalisation or order of classes fits; is it the network of these images?"
    named = [""] * data.num_classes
    for label, output in enumerate(order):
        named[output] = data.classes[label]
    classes = f" --classes {','.join(named)}" if order != sorted(order) else ""
    return f"With {way}{classes} it is {best:.1%} on {len(samples)} images; try that, in another --out."


def _confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """How many images of each class (row) have each output (column) highest, (K, K)."""
    classes = logits.shape[1]
    pairs = labels.to(logits.device) * classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
