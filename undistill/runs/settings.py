"""Settings of a training, and those with which a run was made."""

from pydantic import Field

from undistill.core.spec import Spec
from undistill.runs.run import Run
from undistill.training.recipe import Recipe


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
    """Seed and recipe with which a run was made; weights that were adopted untrained have the default epochs.

    Where the run was compiled, a trial decides anew whether that pays.
    """
    made = Settings(**{name: run.record["settings"].get(name) for name in Settings.model_fields})
    changes: dict[str, object] = {} if made.recipe.epochs else {"epochs": Recipe().epochs}
    if made.recipe.compute.compile:  # a stranger's record may not force it: it can take hours
        changes["compute"] = made.recipe.compute.model_copy(update={"compile": "auto"})
    return Settings(seed=made.seed, recipe=made.recipe.model_copy(update=changes))
