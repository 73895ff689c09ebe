"""Standard knowledge distillation."""

from pydantic import Field
from torch import nn

from undistill.attacks.attack import Distillation, Role, tries
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.training.losses import cross_entropy, distillation
from undistill.training.objectives import Terms, Weighted
from undistill.victims.answer import Answer


class SoftLabels(Distillation):
    """`alpha T^2 KL(victim/T || student/T) + (1 - alpha) CE` (Hinton, Vinyals and Dean 2015)."""

    role = Role.PLAIN
    capturable = True
    space = tries(T=(1.0, 2.0, 4.0, 8.0, 20.0), alpha=(0.5, 0.9, 1.0))
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)

    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> Terms:
        logits = student(batch.images)
        soft, ce = distillation(answer.filled, logits, self.T), cross_entropy(logits, batch.labels)
        return {"soft": Weighted(soft, self.alpha), "ce": Weighted(ce, 1 - self.alpha)}
