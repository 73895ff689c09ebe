"""The nasty teacher: self-undermining knowledge distillation (Ma et al., ICLR 2021)."""

import math

from pydantic import Field
from torch import nn

from undistill.core.spec import Temperature, Weight
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.defences.defence import Defence, Fresh
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, undermining
from undistill.training.objectives import Terms, Weighted


class Nasty(Defence):
    """`CE(nasty, y) - omega T^2 KL(nasty/T || adversary/T)`, the adversary a frozen normal network (eq. 2).

    The paper calls the frozen network an adversary. It attacks nothing: it is what the nasty teacher learns to differ
    from, by default the honest teacher.
    """

    omega: Weight = 0.04
    T: Temperature = 4.0
    warm_start: float | None = Field(None, gt=0, le=1)
    """None trains from scratch, as published. A share starts from the unprotected weights and takes that share of the
    recipe's epochs."""
    adversary: str | None = None
    """A run folder whose network to differ from, instead of the honest teacher."""

    @property
    def reference(self) -> str | None:
        return self.adversary

    def protect(self, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        network, reference = fresh(), fit.answers(honest)
        epochs = fit.recipe.epochs
        if self.warm_start:
            network.load_state_dict(current.state_dict())
            epochs = math.ceil(self.warm_start * epochs)

        def objective(nasty: nn.Module, batch: Batch) -> Terms:
            logits = nasty(batch.images)
            divergence = undermining(logits, reference(batch), self.T)
            return {"ce": cross_entropy(logits, batch.labels), "undermining": Weighted(divergence, self.omega)}

        rounding = 1e-6 * self.T**2  # of a KL in fp32, in nats
        return fit(network, data, objective, epochs=epochs, bounds={"undermining": rounding})
