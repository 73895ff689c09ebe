"""`train`: from data and a network to a run folder."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from undistill.core import distributed
from undistill.core.errors import NonFinite
from undistill.core.files import sha256
from undistill.core.progress import Progress
from undistill.core.seeds import derive
from undistill.data.batches import Batch
from undistill.data.source import Source
from undistill.data.split import Data
from undistill.models.model import Model
from undistill.models.trial import require_whole, same_weights
from undistill.models.weights import largest_weights, load_weights
from undistill.runs.folder import Record, claim, together
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.training import metrics
from undistill.training.compute import pick_device
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.metrics import evaluate


def train(
    data: str | Source,
    model: str | Model | Callable[..., nn.Module],
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
    source, spec = Source.from_user(data), Model.from_user(model)
    loaded = source.load()
    seed = derive(settings.seed, "honest")
    network = spec.build(loaded.shape, loaded.num_classes, seed)
    start = sha256(Path(weights), largest_weights(network)) if weights and Path(weights).is_file() else None
    request = {
        "command": "train",
        "data": str(source),
        "data_sha256": loaded.digest,
        "model": str(spec),
        "start_sha256": start,
        "refers": spec.refers(),
        "settings": settings.model_dump(mode="json"),
    }
    other = spec.build(loaded.shape, loaded.num_classes, seed + 1)
    require_whole(network, other, loaded.shape, str(spec))
    pretrained = same_weights(network, other)
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
            record = record_of(request, loaded, fit, network, str(weights or spec)) | {"pretrained": pretrained}
            place.finish(network, record, other, loaded.validation)
    return Run.open(out)


def record_of(request: Record, data: Data, fit: Fit, network: nn.Module, who: str) -> Record:
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
