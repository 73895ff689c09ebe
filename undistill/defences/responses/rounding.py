"""Rounded probabilities, as an API shows them (Tramer et al., USENIX Security 2016, section 7)."""

from pydantic import Field
from torch import Tensor

from undistill.core.unshown import LOG_ZERO
from undistill.defences.defence import ResponseDefence
from undistill.victims.answer import Answer
from undistill.victims.protected import Response

EPSILON = 1e-4  # of a step: a probability that is a whole number of steps is not rounded down for its last bit


class Rounding(ResponseDefence):
    """Probabilities are rounded down to `digits` decimals; the top class takes what they lose, and so stays the top."""

    digits: int = Field(1, ge=0, le=6)

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Rounded(self.digits)


class Rounded(Response):
    """Every probability but the highest rounded down to a multiple of 10^-digits."""

    def __init__(self, digits: int) -> None:
        super().__init__()
        self.digits = digits

    def extra_repr(self) -> str:
        return f"digits={self.digits}"

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        steps = 10.0**self.digits
        top = answer.top[:, None]
        p = answer.log_p.exp().masked_fill(~answer.shown, 0.0)
        rounded = (p * steps + EPSILON).floor() / steps
        others = rounded.scatter(1, top, 0.0)
        p = others.scatter(1, top, p.sum(1, keepdim=True) - others.sum(1, keepdim=True))
        return Answer(p.log().clamp_min(LOG_ZERO), answer.shown)
