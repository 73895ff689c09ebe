"""Standard knowledge distillation."""

from pydantic import Field
from torch import nn

from undistill.attacks.attack import Attack
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit, Terms, Weighted
from undistill.training.losses import cross_entropy, distillation
from undistill.victims.oracle import Access, Oracle


class SoftLabels(Attack):
    """`alpha T^2 KL(victim/T || student/T) + (1 - alpha) CE` (Hinton, Vinyals and Dean 2015)."""

    needs = Access.QUERY
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)

    def run(self, oracle: Oracle, student: nn.Module, data: Split, fit: Fit) -> nn.Module:
        def objective(network: nn.Module, batch: Batch) -> Terms:
            logits = network(batch.images)
            soft, ce = distillation(oracle(batch), logits, self.T), cross_entropy(logits, batch.labels)
            return {"soft": Weighted(soft, self.alpha), "ce": Weighted(ce, 1 - self.alpha)}

        return fit(student, data, objective)
