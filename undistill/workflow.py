"""`train` and `protect`: from data and a network to a run folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill import distributed, measure
from undistill.answers import GIB, REMEMBER, AnswerStore
from undistill.data import Data, Source
from undistill.defences import Defence
from undistill.errors import DataError, NonFinite, SpecError
from undistill.files import sha256
from undistill.fit import Fit
from undistill.losses import cross_entropy
from undistill.measure import evaluate
from undistill.models import Model, largest_weights, load_weights, returned, seeded
from undistill.progress import Progress
from undistill.recipe import Recipe
from undistill.seeds import derive
from undistill.spec import Spec
from undistill.store import Record, Run, claim, difference
from undistill.stream import Batch


class Settings(Spec):
    """What `--config` and `--set` may say: `seed=1`, `recipe.epochs=30`."""

    seed: int = Field(0, ge=0, lt=2**31)
    recipe: Recipe = Recipe()


class TrainSettings(Settings):
    """As `Settings`, and the honest teacher's objective."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)


class AuditSettings(Spec):
    """What `audit --config` and `--set` may say: how students are trained."""

    recipe: Recipe


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
    source, model = Source.named(data), Model.named(model)
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
    defence = Defence.named(defence)
    model = honest.model(None if model is None else Model.named(model))
    data = honest.data()
    request = {
        "command": "protect",
        "parent": {"folder": os.path.relpath(honest.folder, out), "weights_sha256": honest.digest},
        "data": honest.record["data"],
        "data_sha256": honest.record["data_sha256"],
        "model": str(model),
        "defence": str(defence),
        "refers": model.refers() | defence.refers(),
        "settings": settings.model_dump(mode="json"),
    }
    seed = derive(settings.seed, "victim")
    teacher, fresh = honest.network(model), honest.fresh(seed, model)
    chosen, name = pick_device(device), type(defence).__name__
    with together(chosen, request), claim(Path(out), request) as place:
        if not place.finished:
            store = AnswerStore(honest.folder / "answers", remember * GIB)
            fit = Fit(settings.recipe, seed, chosen, place.folder, progress or Progress.silent(), name, store=store)
            with seeded(derive(settings.seed, "defence")):
                victim = defence.protect(teacher.to(chosen), fresh, data.split, fit)
                victim = returned(victim, defence, data.shape, data.num_classes)
            record = _record(request, data, fit, victim, str(defence))
            record["metrics"]["divergence"] = measure.divergence(
                evaluate(victim, data.validation), evaluate(teacher, data.validation)
            )
            place.finish(victim, record)
    return Run.open(out)


@contextmanager
def together(device: torch.device, request: Record) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; `DataError` in all unless all want the same."""
    own = {"data", "parent"}  # which name folders of one machine; hashes say what is in them
    shared = {name: value for name, value in request.items() if name not in own}
    shared["parent_sha256"] = request.get("parent", {}).get("weights_sha256")
    with distributed.group(device):
        everyone = distributed.gathered(shared)
        for number, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                field, ours, others = difference(everyone[0], theirs)
                raise DataError(
                    f"Process {number} has another {field} than process 0 ({others} there, {ours} here). torchrun "
                    "needs the same data and settings everywhere; copy them, or share one file system."
                )
        yield


def recorded_settings(run: Run) -> Settings:
    """Seed and recipe with which a run was made; weights that were adopted untrained have the default epochs.

    Where the run was compiled, a trial decides anew whether that pays.
    """
    made = Settings(**{name: run.record["settings"].get(name) for name in Settings.model_fields})
    changes: dict[str, object] = {} if made.recipe.epochs else {"epochs": Recipe().epochs}
    if made.recipe.engine.compile:  # a stranger's record may not force it: it can take hours
        changes["engine"] = made.recipe.engine.model_copy(update={"compile": "auto"})
    return Settings(seed=made.seed, recipe=made.recipe.model_copy(update=changes))


def pick_device(name: str) -> torch.device:
    """`auto`, or a device that is there; `SpecError` otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = distributed.local_device(name)
    try:
        tried = torch.zeros(1, device=name)
        tried.item()
    except Exception as error:  # torch raises many kinds for a device that is not there
        raise SpecError(f"Device '{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    return tried.device  # cuda:0 for cuda


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
        "engines": fit.engines,
        "processes": distributed.world(),
        "seconds": round(fit.seconds, 3),
        "metrics": {
            "validation_accuracy": measure.accuracy(logits, labels),
            "validation_nll": measure.nll(logits, labels),
            "validation_ece": measure.ece(logits, labels),
        },
    }
