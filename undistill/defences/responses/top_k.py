"""The highest probabilities alone, as an API shows them (Orekondy et al., CVPR 2019)."""

import torch
from pydantic import Field
from torch import Tensor

from undistill.core.unshown import LOG_ZERO
from undistill.defences.defence import ResponseDefence
from undistill.victims.answer import Answer, Form
from undistill.victims.protected import Response


class TopK(ResponseDefence):
    """Only the `k` highest probabilities are shown, as they are."""

    k: int = Field(3, ge=1, le=100_000)

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Highest(min(self.k, num_classes))


class Highest(Response):
    """Hides all but the `k` highest entries that were shown."""

    form = Form.TOP

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def extra_repr(self) -> str:
        return f"k={self.k}"

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        ranked = answer.log_p.masked_fill(~answer.shown, -torch.inf).topk(self.k, dim=1).indices
        shown = torch.zeros_like(answer.shown).scatter(1, ranked, True) & answer.shown
        return Answer(answer.log_p.masked_fill(~shown, LOG_ZERO), shown)
