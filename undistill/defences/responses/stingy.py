"""The stingy teacher's sparse answers (Ma et al., NeurIPS 2022), applied to the interface at T = 1."""

import torch
from pydantic import Field
from torch import Tensor

from undistill.core.unshown import LOG_ZERO
from undistill.defences.defence import ResponseDefence
from undistill.victims.answer import Answer
from undistill.victims.protected import Response


class Stingy(ResponseDefence):
    """The `share` of the classes with the highest logits, at least one, share all of the probability.

    Published code does this inside the thief's loss, where only the owner could; here it is the answer itself.
    """

    share: float = Field(0.2, gt=0, le=1)
    """Share of the classes that is kept, rounded down; 0.2 for CIFAR-10 and 0.1 for others are the published values."""

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Sparse(max(int(self.share * num_classes + 1e-9), 1))


class Sparse(Response):
    """Softmax over the `kept` highest log-probabilities, 0 elsewhere."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def extra_repr(self) -> str:
        return f"kept={self.kept}"

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        highest = answer.filled.topk(self.kept, dim=1)
        sparse = torch.full_like(answer.log_p, LOG_ZERO)
        log_p = sparse.scatter(1, highest.indices, highest.values.log_softmax(1)).clamp_min(LOG_ZERO)
        return Answer(log_p, torch.ones_like(answer.shown), whole=True)
