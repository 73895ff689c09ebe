"""Settings of a training, and those with which a run was made."""

import math

from pydantic import Field

from undistill.core.spec import Spec
from undistill.runs.run import Run
from undistill.training.recipe import Recipe

LEAST, MOST = 800, 8000  # steps of a training of which nothing is known but its images
LONGEST = 160  # epochs; with more nothing was measured


class Settings(Spec):
    """Settings of a training, as `--config` and `--set` give them: `seed=1`, `recipe.epochs=30`."""

    seed: int = Field(0, ge=0, lt=2**31)
    recipe: Recipe = Recipe()


class TrainSettings(Settings):
    """Settings of the honest network, with its objective."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)


class AuditSettings(Spec):
    """Settings of an audit, as `--config` and `--set` give them: how students are trained."""

    recipe: Recipe


def recorded_settings(run: Run) -> Settings:
    """Seed and recipe with which a run was made; weights that were adopted untrained have `needed_epochs`.

    Where the run was compiled, a trial decides anew whether that pays.
    """
    made = Settings(**{name: run.record["settings"].get(name) for name in Settings.model_fields})
    changes: dict[str, object] = {}
    if not made.recipe.epochs:
        changes["epochs"] = needed_epochs(run.record.get("train_images"), made.recipe.batch_size)
    if made.recipe.compute.compile:  # a stranger's record may not force it: it can take hours
        changes["compute"] = made.recipe.compute.model_copy(update={"compile": "auto"})
    return Settings(seed=made.seed, recipe=made.recipe.model_copy(update=changes))


def needed_epochs(images: int | None, batch_size: int) -> int:
    """The usual epochs, or as many more that few images are seen often enough, or fewer where images are many.

    What small students learn goes by the steps that they make: docs/log/training.md.
    """
    usual = Recipe().epochs
    if images is None:  # runs of earlier versions do not say
        return usual
    batches = math.ceil(images / batch_size)
    return min(max(math.ceil(LEAST / batches), min(usual, math.ceil(MOST / batches))), LONGEST)
