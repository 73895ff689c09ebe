"""`export`: from a run to a folder that works without this package."""

import re
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined
from safetensors.torch import save
from torch import Tensor, nn

import undistill
from undistill.auditing.schema import Report
from undistill.core.errors import ModelError, SpecError, StoreError, unknown
from undistill.core.files import fresh_name, sha256, write_atomically, write_json, write_text
from undistill.data.source import Source
from undistill.data.views import to_float
from undistill.defences.defence import Defence
from undistill.models.model import Model
from undistill.report.page import read_report
from undistill.runs.run import Run
from undistill.ship.graph import Shipped, require_graph, state_of, write_onnx, write_program
from undistill.ship.manifest import MANIFEST, Audited, Manifest, audited, read_manifest
from undistill.victims.victim import NetworkVictim

Format = Literal["all", "onnx", "torch"]
FORMATS = ("all", "onnx", "torch")
TOLERANCE = 1e-4
"""Largest difference of a probability between a file and its run."""
AT_THRESHOLD = 1e-3
"""Share of images that rounding may move over a threshold of a response."""
EQUAL = 1e-6
"""Difference of two probabilities of which either may be the top one."""
COMPARED = 2048  # validation images
PART = 256


def export(
    run: str | Path | Run,
    to: str | Path,
    *,
    format: Format = "all",
    audit: str | Path | None = None,
    model: str | Model | nn.Module | Callable[..., nn.Module] | None = None,
    defences: Sequence[str | Defence] = (),
) -> Path:
    """Write the network of a run, its responses included, into a folder that runs with torch or onnxruntime alone.

    The files are compared with the run on validation images before the folder appears.

    Args:
        run: a run folder.
        to: the new folder.
        format: 'onnx' (model.onnx), 'torch' (model.pt2 and weights.safetensors), or 'all'.
        audit: the folder of an audit of this very run, whose verdict the card gives.
        model: the user's own network, named again, since a stored run may not execute code by itself.
        defences: responses of the user's own, named again for the same reason.
    """
    if format not in FORMATS:
        raise SpecError(unknown("format", format, FORMATS))
    run, to = run if isinstance(run, Run) else Run.open(run), Path(to)
    run.trust(defences)
    network = run.network(None if model is None else Model.from_user(model))
    require_graph(network)
    verdict = None if audit is None else audited(report_of(run, Path(audit)), sha256(Path(audit) / "report.json"))
    if to.exists():
        return _found(run, to, format, verdict)
    data = run.data()
    images = to_float(data.validation[torch.arange(min(len(data.validation), COMPARED))].pixels)
    shipped = Shipped.of(network, images[:2])
    to.parent.mkdir(parents=True, exist_ok=True)
    place = fresh_name(to.parent)
    place.mkdir()
    try:
        found = _written(shipped, run, images, place, format)
        manifest = _manifest(run, shipped, found, place).model_copy(update={"audited": verdict, "name": to.name})
        write_text(place / "README.md", card(manifest, format))
        manifest = manifest.model_copy(update={"files": _hashes(place)})
        write_json(place / MANIFEST, manifest.model_dump(mode="json"))
        place.rename(to)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return to


class Compared(NamedTuple):
    """How the files answered beside the run."""

    images: int
    largest: float
    at_threshold: int


def _written(shipped: Shipped, run: Run, images: Tensor, place: Path, format: Format) -> Compared:
    """Write the model files, and compare each with the run."""
    with torch.no_grad():
        expected = _joined([shipped(part) for part in images.split(PART)])
    write_text(place / "model.py", (files("undistill.ship") / "templates" / "model.py.txt").read_text("utf-8"))
    write_json(place / MANIFEST, {"classes": run.record["classes"]})  # which model.py reads
    runtimes = ("onnx", "torch") if format == "all" else (format,)
    if "torch" in runtimes:
        write_atomically(place / "weights.safetensors", lambda file: file.write(save(state_of(shipped))))
        write_program(shipped, run.shape, place / "model.pt2")
    if "onnx" in runtimes:
        write_onnx(shipped, run.shape, place / "model.onnx")
    num_classes = len(run.record["classes"])
    all_compared = [_compare(runtime, place, images, expected, num_classes) for runtime in runtimes]
    return max(all_compared, key=lambda one: (one.at_threshold, one.largest))


def _compare(runtime: str, place: Path, images: Tensor, expected: list[Tensor], num_classes: int) -> Compared:
    """Ask the exported files as their users will; `ModelError` where they answer otherwise than the run."""
    predict = load(place)(runtime)

    def ask(some: Tensor) -> list[Tensor]:
        return [torch.as_tensor(one) for one in predict(some.numpy() if runtime == "onnx" else some)]

    found, alone = _joined([ask(part) for part in images.split(PART)]), ask(images[:1])
    if any(len(one) != 1 for one in alone):
        raise ModelError(f"The file for {runtime} takes {PART} images at once and no single one.")
    now, before = _dense(found, num_classes), _dense(expected, num_classes)
    apart = (now - before).abs().amax(1)
    rows = int((apart > TOLERANCE).sum())
    of_its_top = before.gather(1, now.argmax(1, keepdim=True))[:, 0]
    flipped = int((before.amax(1) - of_its_top > EQUAL).sum())
    if flipped or rows > AT_THRESHOLD * len(images):
        raise ModelError(
            f"The file for {runtime} answers {rows} of {len(images)} validation images otherwise than the run (by up "
            f"to {float(apart.max()):.2g}), and {flipped} with another top answer; nothing was exported. Another "
            "--format leaves that file out."
        )
    return Compared(len(images), float(apart[apart <= TOLERANCE].max()), rows)


def _dense(outputs: list[Tensor], num_classes: int) -> Tensor:
    """Probabilities (B, K) of any outputs, 0 for classes that are not shown."""
    if len(outputs) == 1:
        return outputs[0]
    p, classes = outputs
    return torch.zeros(len(p), num_classes).scatter(1, classes, p)


def load(folder: Path) -> Callable[[str], Callable[[Any], Any]]:
    """`load` of the model.py in an exported folder that this process wrote itself."""
    names: dict[str, Any] = {"__file__": str(folder / "model.py"), "__name__": "model"}
    exec((files("undistill.ship") / "templates" / "model.py.txt").read_text("utf-8"), names)
    found: Callable[[str], Callable[[Any], Any]] = names["load"]
    return found


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(list(column)) for column in zip(*parts, strict=True)]


def verdict_of(folder: Path, audit: Path | None) -> Audited | None:
    """The findings of an audit of a run or an exported folder; without one those that the latter holds, if any.

    Raises `StoreError` for the audit of another model.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if audit is None:
        return manifest.audited if manifest else None
    if manifest:
        report = require_audit(audit, manifest.weights_sha256, manifest.responses, folder)
    else:
        report = report_of(Run.open(folder), audit)
    return audited(report, sha256(audit / "report.json"))


def report_of(run: Run, folder: Path) -> Report:
    """The report of an audit of this run; `StoreError` for that of another model."""
    return require_audit(folder, run.digest, list(map(_without_paths, run.record.get("responses", []))), run.folder)


def require_audit(audit: Path, digest: str, responses: Sequence[str], what: Path) -> Report:
    """The report of an audit of a model with these weights and responses; `StoreError` for that of another."""
    report = read_report(audit)
    if digest not in [pair.victim_sha256 for pair in report.pairs]:
        raise StoreError(f"{audit} is the audit of another model than {what}.")
    if list(map(_without_paths, report.pairs[0].responses)) != list(responses):
        raise StoreError(f"{audit} is the audit of other responses than those of {what}.")
    return report


def _found(run: Run, to: Path, format: Format, verdict: Audited | None) -> Path:
    """The folder, if it holds the same export already; its card gets another verdict, if one is named."""
    if not (to / MANIFEST).exists():
        raise StoreError(f"{to} is there already and no exported folder; choose another --to.")
    manifest = read_manifest(to)
    wanted = {"all": ("model.onnx", "model.pt2"), "onnx": ("model.onnx",), "torch": ("model.pt2",)}[format]
    if manifest.identity != run.identity or any(name not in manifest.files for name in wanted):
        raise StoreError(f"{to} holds another export; choose another --to, or remove that folder.")
    if verdict and verdict != manifest.audited:
        manifest = manifest.model_copy(update={"audited": verdict})
        write_text(to / "README.md", card(manifest, format))
        write_json(to / MANIFEST, manifest.model_copy(update={"files": _hashes(to)}).model_dump(mode="json"))
    return to


def _manifest(run: Run, shipped: Shipped, found: Compared, place: Path) -> Manifest:
    record, network = run.record, shipped.network
    victim, source = NetworkVictim.of(network), Source.parse(run.record["data"])
    return Manifest(
        name=place.name,
        undistill=undistill.__version__,
        classes=record["classes"],
        shape=run.shape,
        shaping=source.reading.shaping,
        background=source.reading.background,
        outputs=shipped.outputs,
        form=victim.form.name.lower(),
        network=_without_paths(record["model"]),
        defences=[_without_paths(text) for text in record.get("defences", [])],
        responses=[_without_paths(text) for text in record.get("responses", [])],
        calibrated_on={_without_paths(text): images for text, images in record.get("calibrated_on", {}).items()},
        bits=victim.bits,
        price=record.get("price"),
        found=record.get("found", {}),
        data=source.title,
        data_sha256=record["data_sha256"],
        identity=run.identity,
        weights_sha256=run.digest,
        accuracy=record["metrics"]["validation_accuracy"],
        compared=found.images,
        tolerance=TOLERANCE,
        largest=found.largest,
        at_threshold=found.at_threshold,
        audited=None,
        files={},
    )


def _without_paths(text: str) -> str:
    """The text of a spec without the folders of this machine: 'net.py:make()' of '/home/me/net.py:make()'."""
    name, parenthesis, fields = text.partition("(")
    return name.rpartition("/")[2] + parenthesis + re.sub(r"'[^']*/([^/']*)'", r"'\1'", fields)


def card(manifest: Manifest, format: Format) -> str:
    """README.md of an exported folder."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = (files("undistill.ship") / "templates" / "card.md").read_text("utf-8")
    return environment.from_string(template).render(m=manifest, format=format)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
