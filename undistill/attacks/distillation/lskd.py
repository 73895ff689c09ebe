"""Logit standardisation (Sun et al., CVPR 2024)."""

import math

from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Distillation, Role, tries
from undistill.core.spec import Temperature, Weight
from undistill.data.batches import Batch
from undistill.training.losses import cross_entropy, distillation
from undistill.training.objectives import Terms, Weighted
from undistill.victims.answer import Answer, Form

EPSILON = 1e-7


class LSKD(Distillation):
    """`CE + weight T^2 KL(victim/T || student/T)` of logits with mean 0 and standard deviation 1 over the classes.

    A temperature, a scale or a shift of the victim's log-probabilities makes no difference to it, as long as they are
    above the floor. Where a probability was rounded to 0, the thief reads `floor`: a logarithm of nearly 0 would make
    up all of the standard deviation, beside which the other classes look equal.
    """

    form = Form.TOP
    role = Role.PLAIN
    capturable = True
    space = tries(T=(1.0, 2.0, 4.0), weight=(1.0, 3.0, 9.0), floor=(1e-12, 1e-05, 0.001))
    T: Temperature = 2.0
    weight: Weight = 9.0
    floor: float = Field(1e-12, gt=0, lt=0.1)
    """Least probability that is believed."""

    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> Terms:
        logits = student(batch.images)
        believed = answer.filled.clamp_min(math.log(self.floor))
        soft = distillation(standardised(believed), standardised(logits), self.T)
        return {"soft": Weighted(soft, self.weight), "ce": cross_entropy(logits, batch.labels)}


def standardised(logits: Tensor) -> Tensor:
    """Logits (B, K) with mean 0 and standard deviation 1 over the classes."""
    logits = logits.float()
    spread = (logits.var(1, keepdim=True) + EPSILON**2).sqrt()  # a root of 0 has no gradient
    return (logits - logits.mean(1, keepdim=True)) / spread
