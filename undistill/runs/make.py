"""`train` and `protect`: from data and a network to a run folder."""

import os
from pathlib import Path

from torch import Tensor, nn

from undistill.core import distributed
from undistill.core.errors import NonFinite
from undistill.core.files import GIB, sha256
from undistill.core.progress import Progress
from undistill.core.seeds import derive, seeded
from undistill.data.batches import Batch
from undistill.data.source import Source
from undistill.data.split import Data
from undistill.defences.defence import Defence
from undistill.models.model import Model, largest_weights, load_weights, returned
from undistill.runs.folder import Record, claim, together
from undistill.runs.run import Run
from undistill.runs.settings import Settings, TrainSettings, recorded_settings
from undistill.training import metrics
from undistill.training.answers import REMEMBER, AnswerStore
from undistill.training.compute import pick_device
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.metrics import evaluate


def train(
    data: str | Source,
    model: str | Model,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    settings: TrainSettings | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Run:
    """Train a classifier normally; its run folder is the honest teacher.

    `weights` is where training starts; with `recipe.epochs=0` they are adopted as they are.
    """
    settings = settings or TrainSettings()
    source, model = Source.from_user(data), Model.from_user(model)
    loaded = source.load()
    seed = derive(settings.seed, "honest")
    network = model.build(loaded.shape, loaded.num_classes, seed)
    start = sha256(Path(weights), largest_weights(network)) if weights and Path(weights).is_file() else None
    request = {
        "command": "train",
        "data": str(source),
        "data_sha256": loaded.digest,
        "model": str(model),
        "start_sha256": start,
        "refers": model.refers(),
        "settings": settings.model_dump(mode="json"),
    }
    if weights:
        load_weights(network, Path(weights))
        network.eval()

    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), batch.labels, settings.label_smoothing)}

    chosen = pick_device(device)
    with together(chosen, request), claim(Path(out), request) as place:
        if not place.finished:
            fit = Fit(settings.recipe, seed, chosen, place.folder, progress or Progress.silent(), "honest teacher")
            network = fit(network, loaded.split, objective)
            place.finish(network, _record(request, loaded, fit, network, str(weights or model)))
    return Run.open(out)


def protect(
    run: str | Path | Run,
    defence: str | Defence,
    out: str | Path,
    *,
    model: str | Model | None = None,
    settings: Settings | None = None,
    device: str = "auto",
    remember: float = REMEMBER,
    progress: Progress | None = None,
) -> Run:
    """Protect the honest teacher of `run`; the victim gets a run folder of its own.

    Without `settings` the recipe and seed are the honest teacher's. `model` names the user's own
    network again, which a stored run may not execute by itself. A defence that asks the honest teacher asks
    once for each view; `remember` is the disk in GiB that the answers may fill, in the teacher's run folder.
    """
    honest = run if isinstance(run, Run) else Run.open(run)
    settings = settings or recorded_settings(honest)
    defence = Defence.from_user(defence)
    model = honest.model(None if model is None else Model.from_user(model))
    data = honest.data()
    other = None if defence.reference is None else Run.open(defence.reference)
    if other is not None:
        other.require(data.shape, data.classes)
    request = {
        "command": "protect",
        "parent": {"folder": os.path.relpath(honest.folder, out), "weights_sha256": honest.digest},
        "data": honest.record["data"],
        "data_sha256": honest.record["data_sha256"],
        "model": str(model),
        "defence": str(defence),
        "refers": model.refers() | defence.refers() | ({defence.reference: other.digest} if other else {}),
        "settings": settings.model_dump(mode="json"),
    }
    seed = derive(settings.seed, "victim")
    teacher, fresh = honest.network(model), honest.fresh(seed, model)
    reference = teacher if other is None else other.network()
    chosen, name = pick_device(device), type(defence).__name__
    with together(chosen, request), claim(Path(out), request) as place:
        if not place.finished:
            store = AnswerStore(honest.folder / "answers", remember * GIB)
            fit = Fit(settings.recipe, seed, chosen, place.folder, progress or Progress.silent(), name, store=store)
            with seeded(derive(settings.seed, "defence")):
                victim = defence.protect(teacher.to(chosen), reference, fresh, data.split, fit)
                victim = returned(victim, defence, data.shape, data.num_classes)
            record = _record(request, data, fit, victim, str(defence))
            record["metrics"]["divergence"] = metrics.divergence(
                evaluate(victim, data.validation), evaluate(teacher, data.validation)
            )
            place.finish(victim, record)
    return Run.open(out)


def _record(request: Record, data: Data, fit: Fit, network: nn.Module, who: str) -> Record:
    """What is known of the finished network; `NonFinite`, naming `who` it comes from, if it answers NaN or infinity."""
    try:
        logits = evaluate(network, data.validation).cpu()
    except NonFinite as error:
        raise NonFinite(f"{who}: {error}") from None
    labels = data.validation.labels
    return request | {
        "classes": list(data.classes),
        "shape": list(data.shape),
        "epochs": len(fit.history),
        "compute": fit.computed,
        "processes": distributed.world(),
        "seconds": round(fit.seconds, 3),
        "metrics": {
            "validation_accuracy": metrics.accuracy(logits, labels),
            "validation_nll": metrics.nll(logits, labels),
            "validation_ece": metrics.ece(logits, labels),
        },
    }
