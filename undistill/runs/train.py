"""`train`: from data and a network to a run folder."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from undistill.core import distributed
from undistill.core.errors import ModelError, NonFinite, remark
from undistill.core.files import sha256
from undistill.core.progress import Progress
from undistill.core.seeds import derive
from undistill.data.arrays import Images, stored
from undistill.data.batches import Batch
from undistill.data.split import Data
from undistill.models.model import Model
from undistill.models.trial import require_whole, same_weights
from undistill.models.weights import fill, largest_weights, read_state, weights_sha256
from undistill.runs.folder import Record, claim, together
from undistill.runs.preprocessing import answers_probabilities
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.training import metrics
from undistill.training.compute import pick_device
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.metrics import evaluate


def train(
    data: Images,
    model: str | Model | nn.Module | Callable[..., nn.Module],
    out: str | Path,
    *,
    weights: str | Path | None = None,
    settings: TrainSettings | None = None,
    device: str = "auto",
    progress: Progress | bool | None = None,
) -> Run:
    """Train a classifier normally; its run folder is the honest teacher.

    Args:
        data: a source or its text, arrays, or a torch Dataset; what is no source yet is kept beside `out`.
        model: a listed network, the user's own function that makes one, or a network, which begins as it is.
        out: the run folder. A stopped run goes on there; a finished one is instant.
        weights: where training starts; with `recipe.epochs=0` they are adopted as they are.
        settings: recipe and seed.
        device: auto, cpu, cuda or cuda:N.
        progress: True shows it on standard error, False nowhere; None shows it in a notebook.
    """
    settings = settings or TrainSettings()
    spec = Model.from_user(model)
    spec.refers()  # code and weights that cannot be read are said before images are
    state = read_state(Path(weights)) if weights else None
    source = stored(data, out)
    loaded = source.load()
    seed = derive(settings.seed, "honest")
    network = spec.build(loaded.shape, loaded.num_classes, seed)
    start = sha256(Path(weights), largest_weights(network)) if weights and Path(weights).is_file() else None
    if isinstance(model, nn.Module) and not weights:
        network.load_state_dict(model.state_dict())
        start = weights_sha256(network)
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
    if pretrained:
        remark(
            f"{spec} begins with weights that it brings. On which images they were trained is not known here, so that "
            "test accuracy may be memory; 'undistill adopt' takes test images that they have not seen."
        )
    if state is not None:
        fill(network, state, str(weights))
        network.eval()
    chosen = pick_device(device)
    if not (Path(out) / "run.json").exists() and answers_probabilities(network.to(chosen), loaded):
        raise ModelError(
            f"{spec} ends with a softmax: it answers probabilities, from which cross-entropy learns little. Leave "
            "it out, so that the network returns logits; one that is trained can be adopted as it is (undistill adopt)."
        )

    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), batch.labels, settings.label_smoothing)}

    with together(chosen, request), claim(Path(out), request) as place, Progress.of(progress) as shown:
        if not place.finished:
            fit = Fit(settings.recipe, seed, chosen, place.folder, shown, "honest teacher")
            network = fit(network, loaded.split, objective, capturable=True)
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
        "train_images": len(data.train),
        "epochs": int(fit.history[-1]["epoch"]) if fit.history else 0,
        "compute": fit.computed,
        "processes": distributed.world(),
        "seconds": round(fit.seconds, 3),
        "metrics": {
            "validation_accuracy": metrics.accuracy(logits, labels),
            "validation_nll": metrics.nll(logits, labels),
            "validation_ece": metrics.ece(logits, labels),
        },
    }
