"""The top class alone, as certain: the floor of what an interface can show."""

import torch
from torch import Tensor

from undistill.core.unshown import LOG_ZERO
from undistill.defences.defence import ResponseDefence
from undistill.victims.answer import Answer
from undistill.victims.protected import Response


class LabelOnly(ResponseDefence):
    """The top class gets probability 1, so that every attack can be tried on the label alone."""

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Label()


class Label(Response):
    """One-hot answers."""

    bits = 0.0

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        log_p = torch.full_like(answer.log_p, LOG_ZERO).scatter(1, answer.top[:, None], 0.0)
        return Answer(log_p, torch.ones_like(answer.shown), whole=True)
