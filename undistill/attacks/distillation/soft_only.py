"""Knowledge distillation without labels."""

from torch import nn

from undistill.attacks.attack import Distillation, Role, ThiefData, tries
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.training.losses import distillation
from undistill.training.objectives import Terms
from undistill.victims.answer import Answer


class SoftOnly(Distillation):
    """`T^2 KL(victim/T || student/T)` alone: what a thief does who has images and no labels."""

    data = ThiefData.UNLABELLED
    role = Role.PLAIN
    capturable = True
    space = tries(T=(0.5, 1.0, 2.0, 4.0, 20.0))
    T: Temperature = 1.0

    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> Terms:
        return {"soft": distillation(answer.filled, student(batch.images), self.T)}
