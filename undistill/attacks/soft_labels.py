"""Standard knowledge distillation."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Attack
from undistill.data import Split
from undistill.fit import Fit
from undistill.losses import cross_entropy, distillation
from undistill.oracle import Access, Oracle
from undistill.spec import Temperature
from undistill.stream import Batch


class SoftLabels(Attack):
    """`alpha T^2 KL(victim/T || student/T) + (1 - alpha) CE` (Hinton, Vinyals and Dean 2015)."""

    needs = Access.QUERY
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)

    def run(self, oracle: Oracle, student: nn.Module, data: Split, fit: Fit) -> nn.Module:
        def objective(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            logits = network(batch.images)
            soft = distillation(oracle(batch), logits, self.T)
            return {"soft": self.alpha * soft, "ce": (1 - self.alpha) * cross_entropy(logits, batch.labels)}

        return fit(student, data, objective)
