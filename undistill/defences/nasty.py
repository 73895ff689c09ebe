"""The nasty teacher: self-undermining knowledge distillation (Ma et al., ICLR 2021)."""

import math
from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from undistill.data import Split
from undistill.defences.defence import Defence
from undistill.fit import Fit
from undistill.losses import cross_entropy, undermining
from undistill.spec import Temperature, Weight
from undistill.store import Run
from undistill.stream import Batch


class Nasty(Defence):
    """`CE(nasty, y) - omega T^2 KL(nasty/T || adversary/T)`, the adversary a frozen normal network."""

    omega: Weight = 0.04
    T: Temperature = 4.0
    warm_start: float | None = Field(None, gt=0, le=1)
    """None trains from scratch, as published; a share starts from the honest weights and takes
    that share of the recipe's epochs."""
    adversary: str | None = None
    """A run folder to differ from, instead of the honest teacher itself."""

    def refers(self) -> dict[str, str]:
        return super().refers() | ({self.adversary: Run.open(self.adversary).digest} if self.adversary else {})

    def protect(self, teacher: nn.Module, fresh: nn.Module, data: Split, fit: Fit) -> nn.Module:
        adversary = fit.answers(self._adversary(data) if self.adversary else teacher)
        epochs = fit.recipe.epochs
        if self.warm_start:
            fresh.load_state_dict(teacher.state_dict())
            epochs = math.ceil(self.warm_start * epochs)

        def objective(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            logits = network(batch.images)
            return {
                "ce": cross_entropy(logits, batch.labels),
                "undermining": self.omega * undermining(logits, adversary(batch), self.T),
            }

        rounding = 1e-6 * self.omega * self.T**2  # of a KL in fp32, in nats
        return fit(fresh, data, objective, epochs=epochs, bounds={"undermining": rounding})

    def _adversary(self, data: Split) -> nn.Module:
        run = Run.open(str(self.adversary))
        run.require(data.shape, data.classes)
        return run.network()
