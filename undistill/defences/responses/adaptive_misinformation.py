"""Adaptive misinformation (Kariyappa and Qureshi, CVPR 2020): wrong answers where the model is not sure."""

import torch
from pydantic import Field
from torch import Tensor

from undistill.defences.surrogate import SurrogateDefence, SurrogateResponse
from undistill.training.losses import misinformation
from undistill.training.objectives import Terms
from undistill.victims.answer import Answer
from undistill.victims.protected import Response


class AdaptiveMisinformation(SurrogateDefence):
    """Answers of which the model is not sure are mixed with those of a network that was trained to be wrong.

    `y' = (1 - a) y + a f(x)` with `a = sigmoid(nu (tau - max y))`; `f` is trained with CE on `log(1 - p_y)`.
    """

    keeps_top = False
    tau: float = Field(0.7, ge=0, le=1)
    """Probability of the top class below which an answer misleads; 0.7 for CIFAR-10 and 0.4 for CIFAR-100 are the
    published values."""
    nu: float = Field(1000.0, gt=0, le=1e6)
    """How sharp that threshold is."""

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Misinforming(self.build(shape, num_classes), tau=self.tau, nu=self.nu)

    def objective(self, logits: Tensor, labels: Tensor) -> Terms:
        return {"misinformation": misinformation(logits, labels)}


class Misinforming(SurrogateResponse):
    """Mixes the answers of `surrogate` into those that are not sure."""

    tau: float
    nu: float

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        p = answer.filled.exp()
        wrong = Answer.of_logits(self.surrogate(inputs)).log_p.exp()
        a = (self.nu * (self.tau - p.amax(1, keepdim=True))).sigmoid()
        return Answer(torch.lerp(p, wrong, a).clamp_min(1e-30).log(), torch.ones_like(answer.shown), whole=True)
