"""Settings of a training, and those with which a run was made."""

import math

from pydantic import Field

from undistill.core.spec import Spec
from undistill.runs.folder import OnRecord
from undistill.training.recipe import Recipe

STEPS = 300, 8000  # at least and at most, in a training of which nothing is known but its images
EPOCHS = 20, 160  # at least, where that is not more than the most steps, and at most


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


def recorded_settings(run: OnRecord) -> Settings:
    """Seed and recipe with which a run was made; weights and black boxes of others have `needed_epochs`.

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
    """Epochs for small networks to learn much of what so many images teach them, in minutes rather than hours.

    What they learn goes by their steps: few images are seen more often, many less often (docs/log/training.md).
    """
    if images is None:  # runs of earlier versions do not say
        return Recipe().epochs
    batches = math.ceil(images / batch_size)
    least, most = (math.ceil(steps / batches) for steps in STEPS)
    return min(max(least, EPOCHS[0]), most, EPOCHS[1])
