"""Data for the report's pictures: answers of both networks to the same test images, and curves of their training."""

import io
import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from undistill.auditing.schema import Side
from undistill.core.errors import StoreError, UndistillError, legible
from undistill.core.files import LARGEST_TEXT, parse_json, read_text, require_plain, sha256, write_atomically
from undistill.core.tensors import LARGEST, read_arrays
from undistill.data.pictures import read_sheet
from undistill.data.split import LONGEST, Data
from undistill.data.views import to_float
from undistill.models.model import Model, features
from undistill.models.trial import device_of
from undistill.runs.folder import OnRecord
from undistill.runs.run import Run
from undistill.training.metrics import DIVERGENCE_T as T
from undistill.training.metrics import evaluate
from undistill.victims.protected import bare

log = logging.getLogger(__name__)

IMAGES = 5
MOST_EPOCHS = 1_000_000
MOST = 1e12  # a measurement beyond is none, and no axis can show it
POINTS = 400

Array = NDArray[Any]


@dataclass(frozen=True)
class Evidence:
    """images (n, C, H, W) uint8 with labels and tempered answers (n, K); t-SNE maps (m, 2) by name with labels (m,);
    sheets of the images that attacks made, and curves of training (`read_curve`), by name."""

    classes: list[str]
    images: Array
    labels: Array
    honest: Array | None
    """None where no twin is known."""
    victim: Array
    point_labels: Array
    maps: dict[str, Array]
    sheets: dict[str, Array]
    curves: dict[str, Array]


def read_curve(run: OnRecord) -> Array | None:
    """Validation accuracy in percent by epoch, (epochs, 1); beside it T^2 KL where a defence undermines, (epochs, 2).

    None for weights that were taken as they were, and, with a warning, for a record that is damaged or was edited.
    """
    file = run.folder / "metrics.jsonl"
    if not file.exists():
        return None
    try:
        if run.record.get("metrics_sha256") not in (None, sha256(file, LARGEST_TEXT)):
            raise ValueError
        undermines = "compute" in run.record  # earlier versions recorded that term with its weight
        rows = [parse_json(line) for line in read_text(file).splitlines()]
        curve = np.array([_point(row, undermines) for row in rows], float)
        epochs = np.array([row["epoch"] for row in rows], int)
        if curve.ndim != 2 or not (np.abs(curve) < MOST).all() or epochs[-1] > MOST_EPOCHS:
            raise ValueError
        curve = np.repeat(curve, np.diff(epochs, prepend=0), axis=0)  # of epochs between, what was measured after them
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, UndistillError):
        log.warning("%s is damaged or was edited; its curve is left out.", file)
        return None
    return curve


def _point(row: Mapping[str, float], undermines: bool) -> list[float]:
    accuracy = 100 * row["validation_accuracy"]
    return [accuracy, -row["undermining"]] if undermines and "undermining" in row else [accuracy]


@dataclass(frozen=True)
class Pictured:
    """A model of which pictures are made."""

    answers: Callable[[Tensor], Tensor]
    """Logits (n, K) for the test images of the given indices (n,)."""
    network: nn.Module | None = None
    """The network, from which features are read; None for a black box."""

    @classmethod
    def of(cls, network: nn.Module, data: Data) -> "Pictured":
        return cls(lambda index: evaluate(network, data.test[index]).cpu(), network)


Models = Mapping[Side, Pictured]
"""The victim, and the honest twin where one is known."""


def write_evidence(
    path: Path,
    data: Data,
    models: Models,
    sheets: Mapping[str, Path] | None = None,
    curves: Mapping[str, Array | None] | None = None,
) -> None:
    """Answers and maps of the models, pictures of made images, and curves of training."""
    arrays = _answered(data, models)
    for name, file in (sheets or {}).items():
        arrays[f"sheet {name}"] = read_sheet(file)
    arrays |= {f"curve {name}": curve for name, curve in (curves or {}).items() if curve is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def evidence_of(honest: Run, victim: Run, model: Model | None = None) -> Evidence:
    """Answers and maps of two runs. `model` names their network again where it is the user's own code."""
    data = victim.data()
    runs: dict[Side, Run] = {"honest": honest, "victim": victim}
    return _evidence(_answered(data, {side: Pictured.of(run.network(model), data) for side, run in runs.items()}))


def _answered(data: Data, models: Models) -> dict[str, Array]:
    """Answers of the models to a few test images of different classes, and t-SNE maps of many images."""
    few = _first_of_each(data.test.labels)[:IMAGES]
    many = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:POINTS]
    shown, points = data.test[few], data.test[many]
    arrays = {
        "classes": np.array(data.classes),
        "images": shown.pixels.numpy(),
        "labels": shown.labels.numpy(),
        "point_labels": points.labels.numpy(),
    }
    for side, model in models.items():
        arrays[side] = F.softmax(model.answers(few) / T, 1).numpy()
        arrays[f"map {side} answers"] = _map(F.softmax(model.answers(many) / T, 1))
        if model.network is None:
            continue
        inner = features(bare(model.network), to_float(points.pixels.to(device_of(model.network))))
        if inner is not None:
            arrays[f"map {side} features"] = _map(inner.cpu())
    return arrays


def read_evidence(path: Path) -> Evidence:
    """`StoreError` for a file that is missing, damaged, or holds arrays of other shapes than `Evidence` says."""
    try:
        if path.exists():
            require_plain(path.parent)
        evidence = _evidence(read_arrays(path, LARGEST))
        _check(evidence)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path} is missing or damaged ({error}); run the audit again.") from None
    return evidence


def _evidence(arrays: Mapping[str, Array]) -> Evidence:
    if scalars := [name for name, array in arrays.items() if not array.ndim]:
        raise ValueError(f"{legible(scalars[0])[:60]} is a single number")
    maps, sheets, curves = (
        {name.removeprefix(kind): arrays[name] for name in arrays if name.startswith(kind)}
        for kind in ("map ", "sheet ", "curve ")
    )
    fields = {name: arrays[name] for name in ("images", "labels", "victim", "point_labels")}
    classes = [legible(str(name))[:LONGEST] for name in arrays["classes"].flat]
    return Evidence(classes, honest=arrays.get("honest"), maps=maps, sheets=sheets, curves=curves, **fields)


def _check(evidence: Evidence) -> None:
    """`ValueError` unless all arrays have the kinds, shapes and ranges that `Evidence` says."""
    n, classes, points = len(evidence.images), len(evidence.classes), len(evidence.point_labels)
    if n > 4 * IMAGES or classes > 10_000 or len(evidence.sheets) > 100 or not evidence.maps:
        raise ValueError(f"{n} images, {classes} classes, {len(evidence.maps)} maps, {len(evidence.sheets)} sheets")
    _require("images", evidence.images, "u", n, (1, 3), ANY, ANY)
    _require("labels", evidence.labels, "iu", n)
    if evidence.honest is not None:
        _require("honest", evidence.honest, "f", n, classes)
    _require("victim", evidence.victim, "f", n, classes)
    _require("point_labels", evidence.point_labels, "iu", points)
    for name, points_of in evidence.maps.items():
        _require(f"map {name}", points_of, "f", points, 2)
    for name, sheet in evidence.sheets.items():
        _require(f"sheet {name}", sheet, "u", ANY, ANY, *[3] * (sheet.ndim - 2))
    for name, curve in evidence.curves.items():
        _require(f"curve {name}", curve, "f", ANY, (1, 2))
    for labels in (evidence.labels, evidence.point_labels):
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError("a label is of no class")


ANY = range(1, 2**31)


def _require(name: str, array: Array, kinds: str, *shape: int | Container[int]) -> None:
    """`ValueError` unless `array` has one of the kinds of numpy's dtypes, that shape, and finite values."""
    sizes = zip(array.shape, shape, strict=False)
    fits = all(size == wanted if isinstance(wanted, int) else size in wanted for size, wanted in sizes)
    if array.dtype.kind not in kinds or array.ndim != len(shape) or not fits or not array.size:
        raise ValueError(f"{legible(name)[:60]} is {array.dtype} of shape {array.shape}")
    if (array.dtype.kind == "u" and array.dtype != np.uint8) or not (np.abs(array) < MOST).all():
        raise ValueError(f"{legible(name)[:60]} holds what it should not")


def _first_of_each(labels: Tensor) -> Tensor:
    """Index of the first sample of every class."""
    return torch.tensor([int((labels == label).nonzero()[0]) for label in labels.unique()])


def _map(points: Tensor) -> Array:
    from sklearn.manifold import TSNE

    points = F.pad(points, (0, max(0, 2 - points.shape[1])))
    perplexity = min(30.0, (len(points) - 1) / 3)
    spread = points.std(0).max() > 1e-6 * points.abs().max()  # a collapsed network answers everything alike
    start = "pca" if spread else "random"
    mapped: Array = TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(points.numpy())
    return mapped
