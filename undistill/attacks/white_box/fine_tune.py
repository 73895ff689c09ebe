"""A fine-tuned copy of the weights, which no defence here can stop."""

from pydantic import Field
from torch import nn

from undistill.attacks.attack import Attack, Fresh, Role
from undistill.core.seeds import derive
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms
from undistill.victims.oracle import Access, Oracle


class FineTune(Attack):
    """The victim's own network, without its responses, trained on some labels: what a leaked file is worth.

    The result is a network of the victim's architecture, whatever student the audit names.
    """

    needs = Access.WEIGHTS
    role = Role.WHITE_BOX
    epochs: int = Field(5, ge=1, le=10_000)
    share: float = Field(0.1, gt=0, le=1)
    """Share of the thief's images whose labels he has."""

    def images(self, count: int) -> int:
        return max(round(self.share * count), 2)

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        few = data.some(self.images(len(data.train)), derive(fit.seed, "few"))

        def objective(network: nn.Module, batch: Batch) -> Terms:
            return {"ce": cross_entropy(network(batch.images), batch.labels)}

        epochs = min(self.epochs, fit.recipe.epochs)
        return fit(oracle.weights.requires_grad_(True), few, objective, epochs=epochs)
