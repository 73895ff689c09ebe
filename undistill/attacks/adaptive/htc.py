"""High-temperature composition against nasty teachers (Jandial et al., ECCV 2022)."""

from typing import Literal

from pydantic import Field
from torch import nn

from undistill.attacks.attack import Distillation, Role, tries
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.training.losses import cross_entropy, distillation, kl
from undistill.training.objectives import Terms, Weighted
from undistill.victims.answer import Answer


class HTC(Distillation):
    """`alpha KL(victim/T || student) + (1 - alpha) CE` at a very high T, which flattens the peaks of a nasty teacher.

    What is left is nearly uniform, with the victim's ranking of the classes. `sides="victim"` softens the victim's
    answer alone, as one public version does; `"both"` softens the student's, too, times T^2, as another does.
    """

    role = Role.ADAPTIVE
    capturable = True
    space = tries(T=(20.0, 50.0, 70.0), alpha=(0.5, 0.9), sides=("victim", "both"))
    T: Temperature = 50.0
    alpha: float = Field(0.9, ge=0, le=1)
    sides: Literal["victim", "both"] = "victim"

    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> Terms:
        logits = student(batch.images)
        one_sided = self.sides == "victim"
        soft = kl(answer.filled / self.T, logits) if one_sided else distillation(answer.filled, logits, self.T)
        return {"soft": Weighted(soft, self.alpha), "ce": Weighted(cross_entropy(logits, batch.labels), 1 - self.alpha)}
