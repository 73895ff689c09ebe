"""`protect`: from the run of an honest network to that of a protected one."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from undistill.core.errors import ModelError, SpecError
from undistill.core.files import GIB
from undistill.core.progress import Progress
from undistill.core.seeds import derive, seeded
from undistill.data.split import Data
from undistill.defences.defence import Defence, ResponseDefence
from undistill.models.model import Model
from undistill.models.trial import returned
from undistill.runs.folder import claim, together
from undistill.runs.run import Run
from undistill.runs.settings import Settings, recorded_settings
from undistill.runs.train import record_of
from undistill.training import metrics
from undistill.training.answers import REMEMBER, AnswerStore
from undistill.training.compute import pick_device
from undistill.training.fit import Fit
from undistill.training.metrics import evaluate


def protect(
    run: str | Path | Run,
    defence: str | Defence | Sequence[str | Defence],
    out: str | Path,
    *,
    model: str | Model | nn.Module | Callable[..., nn.Module] | None = None,
    settings: Settings | None = None,
    device: str = "auto",
    remember: float = REMEMBER,
    progress: Progress | bool | None = None,
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
        progress: True shows it on standard error, False nowhere; None shows it in a notebook.
    """
    honest = run if isinstance(run, Run) else Run.open(run)
    settings = settings or recorded_settings(honest)
    defences = [Defence.from_user(one) for one in ([defence] if isinstance(defence, str | Defence) else defence)]
    if not defences:
        raise SpecError("Nothing protects without a defence; name one, such as Nasty(price=0.5) (--price 0.5).")
    if honest.record.get("defences"):
        raise SpecError(f"{honest.folder} is protected already. Protect the run it was made from, by all defences.")
    require_order(defences)
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
        **{name: honest.record[name] for name in ("adapter", "unseen") if honest.record.get(name)},
        "defences": list(map(str, defences)),
        "refers": refers,
        "settings": settings.model_dump(mode="json"),
    }
    seed, chosen = derive(settings.seed, "victim"), pick_device(device)
    teacher, name = honest.network(model).to(chosen), " + ".join(type(one).__name__ for one in defences)
    with together(chosen, request), claim(Path(out), request) as place, Progress.of(progress) as shown:
        if not place.finished:
            store = AnswerStore(honest.folder / "answers", remember * GIB)
            fit = Fit(settings.recipe, seed, chosen, place.folder, shown, name, store=store)
            fresh = _Fresh(honest, model, seed)
            victim: nn.Module = teacher
            for one in defences:
                one.check(teacher, data.split)
            with seeded(derive(settings.seed, "defence")):
                for one in defences:
                    reference = references[one.reference].network().to(chosen) if one.reference else teacher
                    victim = one.protect(victim, reference, fresh, data.split, fit)
                    victim = returned(victim, one, data.shape, data.num_classes)
            record = record_of(request, data, fit, victim, ", ".join(map(str, defences)))
            record["responses"] = [str(one) for one in defences if _restructures(one, teacher, data)]
            record["calibrated_on"] = _calibration(defences, data)
            again = _rebuilt(honest.fresh(seed, model), victim, defences, data)
            record |= {"found": fit.found, "price": stated_price(defences)}
            record["metrics"] |= _beside(victim, teacher, data)
            place.finish(victim, record, again, data.validation)
    return Run.open(out)


def require_order(defences: Sequence[Defence]) -> None:
    """Raise `SpecError` for a defence that undoes another: one that trains after a response, or beside a price."""
    trained = [one for one in defences if not isinstance(one, ResponseDefence)]
    if stated_price(trained) and len(trained) > 1:
        raise SpecError(
            f"{trained[0]} and {trained[1]} both train the network, and a price holds for one of them; leave one out."
        )
    for before, after in itertools.pairwise(defences):
        if isinstance(before, ResponseDefence) and not isinstance(after, ResponseDefence):
            raise SpecError(
                f"{after} trains the network, and {before} changes the answers of a network that is trained; name "
                f"{type(after).__name__} first."
            )


def _beside(victim: nn.Module, honest: nn.Module, data: Data) -> dict[str, float]:
    """Measurements of a victim beside the honest network, on validation images."""
    after, before = (evaluate(network, data.validation).cpu() for network in (victim, honest))
    lost, error = metrics.accuracy_lost(after, before, data.validation.labels)
    divergence = metrics.divergence(after, before)
    return {"divergence": divergence, "accuracy_lost": lost, "accuracy_lost_error": error}


def stated_price(defences: Sequence[Defence]) -> float | None:
    """Points of accuracy that the owner accepts to lose, if one of the defences states a price."""
    return next((one.price for one in defences if getattr(one, "price", None)), None)  # type: ignore[attr-defined]


def _calibration(defences: Sequence[Defence], data: Data) -> dict[str, str]:
    """The images on which each response was calibrated, by its text."""
    parts = {"training": data.train, "validation": data.validation}
    return {
        str(one): f"{len(parts[one.calibrated_on]):,} {one.calibrated_on} images"
        for one in defences
        if isinstance(one, ResponseDefence) and one.calibrated_on
    }


def _restructures(defence: Defence, network: nn.Module, data: Data) -> bool:
    """Whether a defence gives a network another structure."""
    return defence.wrap(network, data.shape, data.num_classes) is not network


def _rebuilt(network: nn.Module, victim: nn.Module, defences: Sequence[Defence], data: Data) -> nn.Module:
    """`network` in the structure of `victim`; `ModelError` for one that loading its run could not rebuild."""
    for one in defences:
        network = one.wrap(network, data.shape, data.num_classes)
    if network.state_dict().keys() != victim.state_dict().keys():
        raise ModelError(
            f"{', '.join(map(str, defences))} gave the network another structure, with which it could not be opened "
            "again. A defence says by its method wrap(current, shape, num_classes) how it builds it."
        )
    return network


class _Fresh:
    """New networks of a run's architecture. The first one is initialised by `seed` itself."""

    def __init__(self, run: Run, model: Model, seed: int) -> None:
        self.run, self.model, self.seed, self.made = run, model, seed, 0

    def __call__(self) -> nn.Module:
        seed = derive(self.seed, f"fresh {self.made}") if self.made else self.seed
        self.made += 1
        return self.run.fresh(seed, self.model)
