"""ModelGuard-W (Tang et al., USENIX Security 2024): the answer nearest to telling nothing within an L1 distance."""

import torch
from pydantic import Field
from torch import Tensor

from undistill.defences.defence import ResponseDefence
from undistill.victims.answer import Answer
from undistill.victims.protected import Response

MARGIN = 1e-4  # between the top class and every other, as published
LEAST = 1e-12  # probability that is told from 0
HALVINGS, STEP = 25, 1e-8  # of the search, and between two points by which it sees whether the value falls
ROUNDING = 1e-12


class ModelGuardW(ResponseDefence):
    """The answer within an L1 distance that tells least about the true one; the top class stays.

    `sum_k y'_k log y_k` is minimised within `||y' - y||_1 <= epsilon`, with a margin of 1e-4 below the top class. The
    optimum is that of a linear program (its equation 6, the defence against an attacker who knows the answers'
    distribution); here a search over the top class's probability finds it.
    """

    epsilon: float = Field(1.0, ge=2 * MARGIN, le=2)
    """L1 distance from the true answer; 2 is the largest there is."""

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Guarded(self.epsilon)


class Guarded(Response):
    """Answers moved from their likely classes to their unlikely ones, below the top class."""

    not_in_graph = "rounding, which differs between runtimes, moves its optimum to another one"

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon:g}"

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        p = guarded(answer.filled.double().exp(), answer.top, self.epsilon)
        return Answer(p.clamp_min(1e-30).log().float(), torch.ones_like(answer.shown), whole=True)


def guarded(y: Tensor, top: Tensor, epsilon: float) -> Tensor:
    """The solution (B, K) of the linear program for answers `y` (B, K) with the top classes `top` (B,).

    With the top value t fixed the best answer is known (`_with_top`), and its value is convex in t. So the best t
    is found by halving; it may lie above the top value of `y`.
    """
    y = y / y.sum(1, keepdim=True)
    highest = y.gather(1, top[:, None])
    others, order = y.scatter(1, top[:, None], torch.inf).sort(dim=1, stable=True)
    others = others[:, :-1]  # ascending
    low = (highest - epsilon / 2).clamp_min((1 + MARGIN * others.shape[1]) / y.shape[1])
    high = (highest + epsilon / 2).clamp_max(1.0)  # always allowed, since only others lose
    for _ in range(HALVINGS):
        t = (low + high) / 2
        now, beyond = _value(others, highest, torch.stack([t, t + STEP]), epsilon)
        falls = (beyond < now) | now.isinf()  # what is not allowed lies below
        low, high = torch.where(falls, t, low), torch.where(falls, high, t)
    moved, _ = _with_top(others, highest, high, epsilon)
    return torch.empty_like(y).scatter(1, order, torch.cat([moved, high], 1))


def _value(others: Tensor, highest: Tensor, t: Tensor, epsilon: float) -> Tensor:
    """`sum_k y'_k log y_k` (P, B, 1) of the best answers with the top values `t` (P, B, 1); infinite if not allowed."""
    moved, allowed = _with_top(others, highest, t, epsilon)
    value = (moved * others.clamp_min(LEAST).log()).sum(-1, keepdim=True) + t * highest.log()
    return value.masked_fill(~allowed, torch.inf)


def _with_top(others: Tensor, highest: Tensor, t: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The best values (..., K - 1) of the other classes when the top one gets `t` (..., 1), and whether it is allowed.

    Were there no limit, the least likely classes would be filled up to the cap, in turn. Towards that, probability is
    taken from the likeliest class downwards and given to the least likely upwards until epsilon / 2 has moved.
    """
    cap = t - MARGIN
    capped = others.minimum(cap)
    cut = (others - capped).sum(-1, keepdim=True)
    places = torch.arange(others.shape[-1], dtype=others.dtype, device=others.device)
    target = (1 - t - cap * places).clamp_min(0).minimum(cap)
    room, surplus = (target - capped).clamp_min(0), (capped - target).clamp_min(0)
    left = epsilon / 2 - (highest - t).clamp_min(0) - cut
    taken = surplus.sum(-1, keepdim=True).minimum(left.clamp_min(0))
    given = highest - t + cut + taken
    above = surplus.sum(-1, keepdim=True) - surplus.cumsum(-1)
    taken_each = (taken - above).clamp_min(0).minimum(surplus)
    given_each = (given - (room.cumsum(-1) - room)).clamp_min(0).minimum(room)
    allowed = (left >= -ROUNDING) & (given >= -ROUNDING)
    return capped - taken_each + given_each, allowed
