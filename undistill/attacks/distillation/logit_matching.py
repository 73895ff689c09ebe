"""Regression on logits (Ba and Caruana, NeurIPS 2014; Kim et al., IJCAI 2021)."""

import math

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Distillation, Role, tries
from undistill.data.batches import Batch
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms, Weighted
from undistill.victims.answer import Answer, Form


class LogitMatching(Distillation):
    """`alpha MSE(student's logits, victim's log-probabilities) + (1 - alpha) CE`, both centred over the classes.

    A log-probability differs from the logit by the same number for all classes, which centring takes away. Where a
    probability was rounded to 0, the thief reads `floor`.
    """

    form = Form.TOP
    role = Role.PLAIN
    capturable = True
    space = tries(alpha=(0.1, 0.5, 0.9), floor=(1e-07, 1e-05, 0.0001, 0.001))
    alpha: float = Field(0.9, ge=0, le=1)
    floor: float = Field(1e-5, gt=0, lt=0.1)
    """Least probability that is believed."""

    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> Terms:
        logits = student(batch.images).float()
        match = F.mse_loss(centred(logits), centred(answer.filled.clamp_min(math.log(self.floor))))
        ce = cross_entropy(logits, batch.labels)
        return {"match": Weighted(match, self.alpha), "ce": Weighted(ce, 1 - self.alpha)}


def centred(logits: Tensor) -> Tensor:
    """Logits (B, K) minus their mean over the classes."""
    return logits - logits.mean(1, keepdim=True)
