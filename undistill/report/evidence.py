"""What the report's pictures are drawn from: answers of both teachers to the same test images, and their training."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor, nn

from undistill.code import is_code
from undistill.data import Data, Samples
from undistill.defences import Defence
from undistill.errors import StoreError
from undistill.files import write_atomically
from undistill.measure import DIVERGENCE_T as T
from undistill.measure import evaluate
from undistill.models import Model, device_of, features
from undistill.states import read_arrays
from undistill.store import Run
from undistill.views import to_float

IMAGES = 5
POINTS = 400

Array = NDArray[Any]


@dataclass(frozen=True)
class Evidence:
    """images (n, C, H, W) uint8 with labels and tempered answers (n, K); t-SNE maps (m, 2) by name with labels (m,);
    sheets of the images that attacks made, and curves of training (`read_curve`), by name."""

    classes: list[str]
    images: Array
    labels: Array
    honest: Array
    victim: Array
    point_labels: Array
    maps: dict[str, Array]
    sheets: dict[str, Array]
    curves: dict[str, Array]


def read_curve(run: Run) -> Array | None:
    """(epochs, 2): validation accuracy in percent, and T^2 KL of the training views, NaN where nothing undermines.

    None for weights that were taken as they were; `StoreError` for a damaged record.
    """
    file = run.folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        omega = _omega(run)
        values = [(100 * row["validation_accuracy"], _divergence(row, omega)) for row in rows]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{file} is damaged.") from None
    return np.array(values) if values else None


def _omega(run: Run) -> float:
    """The weight of its undermining term; 0 where there is none, or the user's own code would have to say."""
    defence = str(run.record.get("defence", ""))
    return getattr(Defence.parse(defence), "omega", 0.0) if defence and not is_code(defence) else 0.0


def _divergence(row: Mapping[str, float], omega: float) -> float:
    return -row["undermining"] / omega if omega and "undermining" in row else math.nan


def write_evidence(
    path: Path,
    data: Data,
    honest: nn.Module,
    victim: nn.Module,
    sheets: Mapping[str, Path] | None = None,
    curves: Mapping[str, Array | None] | None = None,
) -> None:
    """Answers and maps of both networks, pictures of made images, and curves of training."""
    arrays = _answered(data, honest, victim)
    for name, file in (sheets or {}).items():
        arrays[f"sheet {name}"] = read_sheet(file)
    arrays |= {f"curve {name}": curve for name, curve in (curves or {}).items() if curve is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def evidence_of(honest: Run, victim: Run, model: Model | None = None) -> Evidence:
    """Answers and maps of two runs. `model` names their network again where it is the user's own code."""
    return _evidence(_answered(victim.data(), honest.network(model), victim.network(model)))


def _answered(data: Data, honest: nn.Module, victim: nn.Module) -> dict[str, Array]:
    """What both answer to a few test images of different classes, and many of them mapped by t-SNE."""
    shown = data.test[_first_of_each(data.test.labels)[:IMAGES]]
    arrays = {
        "classes": np.array(data.classes),
        "images": shown.pixels.numpy(),
        "labels": shown.labels.numpy(),
        "honest": _tempered(honest, shown),
        "victim": _tempered(victim, shown),
    }
    generator = torch.Generator().manual_seed(0)
    points = data.test[torch.randperm(len(data.test), generator=generator)[:POINTS]]
    arrays["point_labels"] = points.labels.numpy()
    for side, network in (("honest", honest), ("victim", victim)):
        arrays[f"map {side} answers"] = _map(F.softmax(evaluate(network, points).cpu() / T, 1))
        inner = features(network, to_float(points.pixels.to(device_of(network))))
        if inner is not None:
            arrays[f"map {side} features"] = _map(inner.cpu())
    return arrays


def read_sheet(file: Path) -> Array:
    """The pixels of a sheet of images; `StoreError` where there is none."""
    try:
        with Image.open(file) as picture:
            return np.asarray(picture)
    except OSError as error:
        raise StoreError(f"The sheet {file} is missing or damaged ({error}).") from None


def read_evidence(path: Path) -> Evidence:
    try:
        return _evidence(read_arrays(path))
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path} is missing or damaged ({error}); run the audit again.") from None


def _evidence(arrays: Mapping[str, Array]) -> Evidence:
    maps, sheets, curves = (
        {name.removeprefix(kind): arrays[name] for name in arrays if name.startswith(kind)}
        for kind in ("map ", "sheet ", "curve ")
    )
    fields = {name: arrays[name] for name in ("images", "labels", "honest", "victim", "point_labels")}
    classes = [str(name) for name in arrays["classes"]]
    return Evidence(classes=classes, maps=maps, sheets=sheets, curves=curves, **fields)


def _first_of_each(labels: Tensor) -> Tensor:
    """Index of the first sample of every class."""
    return torch.tensor([int((labels == label).nonzero()[0]) for label in labels.unique()])


def _tempered(network: nn.Module, samples: Samples) -> Array:
    return F.softmax(evaluate(network, samples).cpu() / T, dim=1).numpy()


def _map(points: Tensor) -> Array:
    points = F.pad(points, (0, max(0, 2 - points.shape[1])))
    perplexity = min(30.0, (len(points) - 1) / 3)
    spread = points.std(0).max() > 1e-6 * points.abs().max()  # a collapsed network answers everything alike
    start = "pca" if spread else "random"
    mapped: Array = TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(points.numpy())
    return mapped
