"""`Recipe`: how a network is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from undistill.core.spec import LearningRate, Spec, within
from undistill.data.views import Views
from undistill.training.compute import Compute


class Recipe(Spec):
    """How the loop runs; the defaults suit small images. `--set recipe.lr=0.01` or `--config FILE` changes a field."""

    epochs: int = Field(40, ge=0, le=1_000_000)
    batch_size: int = Field(64, ge=2, le=1_000_000)
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr: LearningRate = 0.05
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD, first beta of AdamW."""
    weight_decay: Annotated[float, within(0, 10, "it pulls the weights to 0 faster than anything can be learnt")] = 5e-4
    schedule: Literal["step", "cosine", "one_cycle"] = "one_cycle"
    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of the epochs in which the learning rate rises to `lr`."""
    drops: tuple[float, ...] = (0.5, 0.75)
    """For schedule 'step': shares of the epochs at which the learning rate falls by `gamma`."""
    gamma: float = Field(0.1, gt=0, lt=1)
    clip: float = Field(5.0, ge=0, le=1e6)
    """Largest norm of the whole gradient; 0 leaves it alone."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the averaged weights that become the result; 0 takes the last weights."""
    selection: Literal["last", "best"] = "last"
    """The epoch whose weights are kept; 'best' goes by validation accuracy."""
    compute: Compute = Compute()
    views: Views = Views()

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, fields: Any) -> Any:
        """`compute` was called `engine` in records and settings of earlier versions."""
        if isinstance(fields, dict) and "engine" in fields and "compute" not in fields:
            return {"compute" if name == "engine" else name: value for name, value in fields.items()}
        return fields

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.schedule == "one_cycle" and self.warmup == 0:
            raise ValueError("schedule 'one_cycle' rises before it falls: warmup must be above 0")
        if any(not 0 < drop < 1 for drop in self.drops):
            raise ValueError("drops are shares of the epochs, between 0 and 1")
        return self
