"""`train` and `protect`: from data and a network to a run folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from undistill.core import distributed
from undistill.core.errors import NonFinite, SpecError
from undistill.core.files import GIB, sha256
from undistill.core.progress import Progress
from undistill.core.seeds import derive, seeded
from undistill.data.batches import Batch
from undistill.data.source import Source
from undistill.data.split import Data, Split
from undistill.defences.defence import Defence, Fresh, ResponseDefence
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
from undistill.victims.protected import bare, with_network


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
    defence: str | Defence | Sequence[str | Defence],
    out: str | Path,
    *,
    model: str | Model | None = None,
    settings: Settings | None = None,
    device: str = "auto",
    remember: float = REMEMBER,
    progress: Progress | None = None,
) -> Run:
    """Protect the honest network of `run`; the victim gets a run folder of its own.

    Args:
        run: the run folder of the honest network.
        defence: one defence, or several that are applied in this order.
        out: the run folder of the victim. A stopped run goes on there; a finished one is instant.
        model: the user's own network, named again, since a stored run may not execute code by itself.
        settings: recipe and seed, by default those of the honest network.
        device: auto, cpu, cuda or cuda:N.
        remember: GiB of disk that answers of the honest network may fill, in its run folder.
        progress: where progress is shown.
    """
    honest = run if isinstance(run, Run) else Run.open(run)
    settings = settings or recorded_settings(honest)
    defences = [Defence.from_user(one) for one in ([defence] if isinstance(defence, str | Defence) else defence)]
    if not defences:
        raise SpecError("Nothing protects without a defence; name one, such as Nasty(omega=0.04, T=4).")
    if honest.record.get("defences"):
        raise SpecError(f"{honest.folder} is protected already. Protect the run it was made from, by all defences.")
    model = honest.model(None if model is None else Model.from_user(model))
    data = honest.data()
    references = {one.reference: Run.open(one.reference) for one in defences if one.reference}
    for other in references.values():
        other.require(data.shape, data.classes)
    refers = {folder: other.digest for folder, other in references.items()}
    for spec in (model, *defences):
        refers |= spec.refers()
    request = {
        "command": "protect",
        "parent": {"folder": os.path.relpath(honest.folder, out), "weights_sha256": honest.digest},
        "data": honest.record["data"],
        "data_sha256": honest.record["data_sha256"],
        "model": str(model),
        "defences": list(map(str, defences)),
        "refers": refers,
        "settings": settings.model_dump(mode="json"),
    }
    seed, chosen = derive(settings.seed, "victim"), pick_device(device)
    teacher, name = honest.network(model).to(chosen), " + ".join(type(one).__name__ for one in defences)
    with together(chosen, request), claim(Path(out), request) as place:
        if not place.finished:
            store = AnswerStore(honest.folder / "answers", remember * GIB)
            fit = Fit(settings.recipe, seed, chosen, place.folder, progress or Progress.silent(), name, store=store)
            fresh = _Fresh(honest, model, seed)
            victim: nn.Module = teacher
            with seeded(derive(settings.seed, "defence")):
                for one in defences:
                    reference = references[one.reference].network().to(chosen) if one.reference else teacher
                    victim = returned(
                        _apply(one, victim, reference, fresh, data.split, fit), one, data.shape, data.num_classes
                    )
            record = _record(request, data, fit, victim, ", ".join(map(str, defences)))
            record["responses"] = [str(one) for one in defences if isinstance(one, ResponseDefence)]
            record["metrics"]["divergence"] = metrics.divergence(
                evaluate(victim, data.validation), evaluate(teacher, data.validation)
            )
            place.finish(victim, record)
    return Run.open(out)


class _Fresh:
    """New networks of a run's architecture. The first one is initialised by `seed` itself."""

    def __init__(self, run: Run, model: Model, seed: int) -> None:
        self.run, self.model, self.seed, self.made = run, model, seed, 0

    def __call__(self) -> nn.Module:
        seed = derive(self.seed, f"fresh {self.made}") if self.made else self.seed
        self.made += 1
        return self.run.fresh(seed, self.model)


def _apply(defence: Defence, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
    """`current` with one more defence. One that trains gets the bare network; responses before it stay over it."""
    if isinstance(defence, ResponseDefence):
        return defence.protect(current, honest, fresh, data, fit)
    return with_network(current, defence.protect(bare(current), honest, fresh, data, fit))


def _record(request: Record, data: Data, fit: Fit, network: nn.Module, who: str) -> Record:
    """Record of a finished network; `NonFinite`, naming `who` made it, if it answers NaN or infinity."""
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
