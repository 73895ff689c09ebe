"""`Served`: what a server answers with, from a run, an exported folder, or a model behind a gateway."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageColor
from torch import nn

from undistill.core.errors import StoreError
from undistill.core.files import require_plain, sha256
from undistill.data.pictures import PLAIN, Reading
from undistill.data.source import Source
from undistill.defences.defence import Defence
from undistill.models.model import Model
from undistill.models.trial import device_of
from undistill.report.page import read_report
from undistill.runs.run import Run
from undistill.serving.batches import Outputs, Predict
from undistill.ship.export import verdict_of
from undistill.ship.graph import CLASSES, INPUT, PROBABILITIES, Shipped
from undistill.ship.manifest import MANIFEST, Audited, audited, read_manifest
from undistill.training.compute import EXACT, pick_device
from undistill.victims.onnx import first_line, session_of


@dataclass(frozen=True)
class Served:
    """A model with its protection, as an interface shows it."""

    title: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Channels, height, width of an image."""
    outputs: tuple[str, ...]
    width: int
    """Numbers of each output for one image."""
    predict: Predict
    """Images (B, C, H, W) in [0, 1] to one array for each of `outputs`."""
    identity: str
    """Hash of everything on which an answer depends."""
    reading: Reading = PLAIN
    """How encoded pictures are brought to that shape."""
    audited: Audited | None = None
    workers: int = 1
    """Batches that may be under way side by side."""

    @property
    def version(self) -> str:
        return self.identity[:12]


def of_run(
    folder: Path,
    *,
    audit: Path | None = None,
    model: str | Model | nn.Module | Callable[..., nn.Module] | None = None,
    defences: Sequence[str | Defence] = (),
    device: str = "auto",
) -> Served:
    """The network of a run with its responses, run by torch."""
    run = Run.open(folder)
    run.trust(defences)
    chosen = pick_device(device)
    network = run.network(None if model is None else Model.from_user(model)).to(chosen)
    shipped = Shipped.of(network, torch.rand(2, *run.shape, generator=torch.Generator().manual_seed(0)).to(chosen))
    return Served(
        title=folder.resolve().name,
        classes=tuple(run.record["classes"]),
        shape=run.shape,
        reading=Source.parse(run.record["data"]).reading,
        identity=run.identity,
        audited=verdict_of(folder, audit),
        outputs=tuple(shipped.outputs),
        width=width_of(shipped, len(run.record["classes"])),
        predict=predict_of(shipped),
    )


def width_of(shipped: Shipped, num_classes: int) -> int:
    """How many numbers an output holds for one image."""
    return num_classes if shipped.shown is None else max(shipped.shown, 1)


def predict_of(shipped: Shipped) -> Predict:
    """A network as a function of arrays."""
    device = device_of(shipped)

    def predict(images: NDArray[np.float32]) -> Outputs:
        with torch.no_grad(), EXACT.active(device):
            found = shipped(torch.from_numpy(np.array(images)).to(device))
        return [one.cpu().numpy() for one in found]

    return predict


def of_export(folder: Path) -> Served:
    """An exported folder, run by onnxruntime. Its model.py and model.pt2 could run code, and are not touched."""
    require_plain(folder)
    manifest = read_manifest(folder)
    path = folder / "model.onnx"
    if "model.onnx" not in manifest.files:
        raise StoreError(
            f"{folder} has no model.onnx, and a program of torch may run code when it is read. Serve the run itself, "
            "or export it with --format onnx."
        )
    session = session_of(str(path))
    names = [one.name for one in session.get_outputs()]
    known = {(PROBABILITIES,), (PROBABILITIES, CLASSES), (CLASSES,)}
    if tuple(names) not in known or [one.name for one in session.get_inputs()] != [INPUT]:
        raise StoreError(f"{path} is none that 'undistill export' writes; export the run again.")
    kinds = {PROBABILITIES: np.float32, CLASSES: np.int64}

    def predict(images: NDArray[np.float32]) -> Outputs:
        found = session.run(names, {INPUT: images})
        return [cast(NDArray[Any], one).astype(kinds[name], copy=False) for name, one in zip(names, found, strict=True)]

    served = Served(
        title=manifest.name,
        classes=tuple(manifest.classes),
        shape=manifest.shape,
        outputs=tuple(names),
        width=len(manifest.classes),
        predict=predict,
        reading=Reading(manifest.shaping, manifest.background),
        identity=manifest.identity,
        audited=manifest.audited,
    )
    return replace(served, width=sound_width(served, str(path)))


def sound_width(served: Served, what: str) -> int:
    """Numbers of each output for one image; `StoreError` for a file that does not answer as its manifest says."""
    try:
        ImageColor.getrgb(served.reading.background)
        found = served.predict(np.zeros((2, *served.shape), np.float32))
    except Exception as error:  # of many kinds, all of onnxruntime
        raise StoreError(f"{what} does not run ({first_line(error)}).") from None
    most = len(served.classes)
    widths = {one.shape[1] if one.ndim == 2 and len(one) == 2 else 0 for one in found}
    if len(widths) != 1 or not 1 <= (width := widths.pop()) <= most or (len(found) == 1 and width not in (1, most)):
        raise StoreError(f"{what} answers {[one.shape for one in found]} for {most} classes; export the run again.")
    return int(width)


def findings_for(folder: Path, audit: Path | None) -> Audited | None:
    """The findings of an audit of a run, an exported folder, or, where it is neither, of the gateway that keeps it."""
    if is_export(folder) or (folder / "run.json").exists():
        return verdict_of(folder, audit)
    return None if audit is None else findings_of_gateway(audit)


def findings_of_gateway(audit: Path, num_classes: int | None = None) -> Audited:
    """The findings of an audit of a gateway; `StoreError` for that of a run, or of a model with other classes."""
    report = read_report(audit)
    if report.pairs[0].reached is None:
        raise StoreError(f"{audit} is the audit of a run, and not of this gateway; audit its address: Http('...').")
    if num_classes not in (None, report.classes):
        raise StoreError(f"{audit} is the audit of a model with {report.classes} classes, and not of this one.")
    return audited(report, sha256(audit / "report.json"))


def is_export(folder: Path) -> bool:
    """Whether a folder is an exported one, and no run."""
    return (folder / MANIFEST).exists()
