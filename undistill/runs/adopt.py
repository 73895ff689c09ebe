"""`adopt`: from weights that were trained elsewhere to a run folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from undistill.core.errors import remark
from undistill.core.seeds import derive
from undistill.data.apart import Apart
from undistill.data.arrays import Images, stored
from undistill.data.split import Data
from undistill.models.adapter import Adapter
from undistill.models.model import Model
from undistill.models.trial import device_of, require_whole
from undistill.models.weights import fill, read_state, weights_sha256
from undistill.runs.folder import claim, together
from undistill.runs.preprocessing import adapter_of, answers_probabilities, better_way, named_order, order_of, some
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.runs.train import record_of
from undistill.training.compute import pick_device
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy, confidence, evaluate
from undistill.training.recipe import Recipe

MEMORY = 0.1  # share of images by which accuracy in training may exceed that on others without a word


def adopt(
    model: str | Model | nn.Module | Callable[..., nn.Module],
    data: Images,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    key: str | None = None,
    preprocess: str | Adapter = "none",
    classes: Sequence[str] = (),
    test: Images | None = None,
    device: str = "auto",
) -> Run:
    """Take a trained classifier as it is; its run folder is that of an honest teacher.

    Args:
        model: a trained network, a function that makes it, `file.py:factory`, or a listed one.
        data: images of the kind that it was trained on; which of them it has seen is not known. A source or its text,
            arrays (images, labels), or a torch Dataset; what is no source yet is kept beside `out`.
        out: the run folder. It keeps the weights under the network's own names.
        weights: safetensors, or a checkpoint of torch; None where the network has them already.
        key: where the checkpoint keeps them, if it holds several.
        preprocess: how the network wants its images: none, imagenet, half, cifar10, mnist, 255, timm, or an `Adapter`.
        classes: the classes in the order of the network's outputs, where that is not the order of the data.
        test: images that the network has not seen, on which everything is then measured.
        device: auto, cpu, cuda or cuda:N.
    """
    spec = Model.from_user(model)
    spec.refers()  # code that cannot be read is said before images are, and so
    state = _given_weights(model, weights, key)  # are weights
    source = stored(data, out)
    if test is not None:
        source = Apart.join(source, stored(test, out))
    loaded, seed, chosen = source.load(), derive(0, "honest"), pick_device(device)
    bare, other = (spec.build(loaded.shape, loaded.num_classes, seed + number) for number in range(2))
    require_whole(bare, other, loaded.shape, str(spec))
    if state is not None:
        fill(bare, state, str(weights or spec))
    start = weights_sha256(bare)
    adapter = adapter_of(preprocess, bare)
    if classes:
        adapter = adapter.model_copy(update={"order": order_of(classes, loaded.classes)})
    if answers_probabilities(adapter.wrap(bare, loaded.shape[0], loaded.num_classes), loaded):
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
    network = adapter.wrap(bare, loaded.shape[0], loaded.num_classes).to(chosen).eval()
    with together(chosen, request), claim(Path(out), request) as place:
        if not place.finished:
            fit = Fit(settings.recipe, seed, chosen)
            record = record_of(request, loaded, fit, network, str(weights or spec))
            record["metrics"] |= _measured(network, loaded)
            record["unseen"] = "test" if test is not None else None
            place.finish(network, record, adapter.wrap(other, loaded.shape[0], loaded.num_classes), loaded.validation)
            _say_doubts(bare.to(chosen), adapter, loaded, record["metrics"])
    return Run.open(out)


def _given_weights(model: object, weights: str | Path | None, key: str | None) -> dict[str, Tensor] | None:
    """The tensors with which the network comes; None where its factory loads them."""
    if weights is not None:
        return read_state(Path(weights), key=key)
    if isinstance(model, nn.Module):
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return None


def _measured(network: nn.Module, data: Data) -> dict[str, float]:
    """Accuracy and mean confidence on training images, and on those that are held out."""
    found = {}
    for name, samples in (("train", some(data.train)), ("test", data.test)):
        logits = evaluate(network, samples)
        found[f"{name}_accuracy"] = accuracy(logits, samples.labels.to(logits.device))
        found[f"{name}_confidence"] = confidence(logits)
    return found


def _say_doubts(network: nn.Module, adapter: Adapter, data: Data, measured: dict[str, float]) -> None:
    """Say what looks wrong: accuracy near chance, and what would mend it; training images that are known by heart."""
    chance = max(torch.bincount(data.test.labels, minlength=data.num_classes).tolist()) / len(data.test)
    if measured["test_accuracy"] < chance + 0.1 * (1 - chance):
        remark(f"Accuracy is near chance ({measured['test_accuracy']:.1%}). {_advice(network, adapter, data)}")
    elif measured["train_accuracy"] > measured["test_accuracy"] + MEMORY:
        remark(
            f"Accuracy is {measured['train_accuracy']:.1%} on training images, {measured['test_accuracy']:.1%} on test "
            "images: the network knows many of the former by heart."
        )


def _advice(network: nn.Module, adapter: Adapter, data: Data) -> str:
    """The options with which a network near chance does clearly better."""
    samples = some(data.train)

    def answers(tried: Adapter) -> Tensor:
        wrapped = tried.wrap(network, data.shape[0], data.num_classes).to(device_of(network))
        return evaluate(wrapped, samples)

    best = better_way(answers, adapter, samples.labels, data.shape[0])
    if best is None:
        return "No usual normalisation or order of classes fits; is it the network of these images?"
    named = ",".join(named_order(best.order, data.classes))
    classes = "" if best.order == tuple(range(data.num_classes)) else f"--classes {named}"
    normalisation = f"--preprocess {best.normalisation}" if best.normalisation else ""
    changed = " ".join(filter(None, (normalisation, classes))) or "classes in the usual order"
    return f"With {changed} it is {best.accuracy:.1%} on {len(samples)} images; try that, in another --out."
