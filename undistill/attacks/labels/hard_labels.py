"""The floor of any attacker who can query: the victim's top answer alone."""

from torch import nn

from undistill.attacks.attack import Distillation, Role, ThiefData
from undistill.data.batches import Batch
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms
from undistill.victims.answer import Answer


class HardLabels(Distillation):
    """Cross-entropy on the top class of the victim's answer to each view; needs no labels."""

    data = ThiefData.UNLABELLED
    role = Role.TOP_ANSWERS
    capturable = True

    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> Terms:
        return {"ce": cross_entropy(student(batch.images), answer.top)}
