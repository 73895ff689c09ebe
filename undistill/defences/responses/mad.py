"""Maximising angular deviation (MAD; Orekondy et al., ICLR 2020): the thief's gradient turns away from the true one."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from undistill.defences.surrogate import SurrogateDefence, SurrogateResponse
from undistill.victims.answer import Answer
from undistill.victims.protected import Response

MARGIN = 1e-4  # between the top class and every other, less where there are many
FEW = 10  # classes of which every set is tried
SIZES = 32  # of sets of more classes that are tried, beside that of all


class MAD(SurrogateDefence):
    """Answers are moved, within an L1 distance, so that a thief's gradient turns away from the true one.

    Of the ways to the corners of "the top class stays", that one is gone on which `||unit(G'y) - unit(G'y')||^2`
    becomes largest within `||y' - y||_1 <= epsilon`. Row k of `G` is the gradient of `log p_k(x)` in the last layer of
    a surrogate, for a student of which the surrogate stands.
    """

    epsilon: float = Field(1.0, gt=0, le=2)
    """L1 distance from the true answer; 2 is the largest there is."""

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Deviating(self.build(shape, num_classes), epsilon=self.epsilon)


class Deviating(SurrogateResponse):
    """Moves each answer towards the corner of "the top class stays" by which the gradient turns furthest.

    In the last layer the gradient of `log p_k` is `(e_k - p) h'`, so that `G'y` is `(y - p) h'`: the features `h`
    cancel in the unit vectors, and the surrogate's answer `p` is all that is needed.
    """

    not_in_graph = "it computes gradients for every answer"

    epsilon: float

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        p = Answer.of_logits(self.surrogate(inputs)).log_p.exp()
        # an even corner ties with the top class, which is to stay the top
        moved = keep_top(deviated(answer.filled.exp(), p, answer.top, self.epsilon), answer.top)
        return Answer(moved.clamp_min(1e-30).log(), torch.ones_like(answer.shown), whole=True)


def deviated(y: Tensor, p: Tensor, top: Tensor, epsilon: float) -> Tensor:
    """The answers (B, K) for which `y' - p` has the smallest cosine with `y - p`, both (B, K); `top` (B,) stays.

    Answers go from `y` towards a corner, as far as `epsilon` allows.
    """
    corners = all_corners(y, top) if y.shape[1] <= FEW else likely_corners(y, p, top)
    distance = (corners - y[:, None]).abs().sum(2, keepdim=True)
    moved = torch.lerp(y[:, None], corners, (epsilon / distance.clamp_min(1e-12)).clamp_max(1.0))
    cosine = F.cosine_similarity((y - p)[:, None], moved - p[:, None], dim=2)
    best = cosine.argmin(1)[:, None, None].expand(-1, 1, y.shape[1])
    return moved.gather(1, best).squeeze(1)


def all_corners(y: Tensor, top: Tensor) -> Tensor:
    """The even distributions (B, 2^(K - 1), K) over every set of classes that holds the top one."""
    classes = y.shape[1]
    places = torch.arange(classes, device=y.device)
    others = (places != top[:, None]).long().cumsum(1) - 1  # numbers the other classes
    numbers = torch.arange(2 ** (classes - 1), device=y.device)[:, None]
    held = ((numbers >> others[:, None].clamp_min(0)) & 1).bool() | (places == top[:, None])[:, None]
    return held / held.sum(2, keepdim=True).to(y)


def likely_corners(y: Tensor, p: Tensor, top: Tensor) -> Tensor:
    """Even distributions (B, C, K) over the top class and those that come first in some orders, for each number."""
    sizes = torch.tensor([*range(1, min(y.shape[1], SIZES + 1)), y.shape[1]], device=y.device)[:, None]
    found = []
    for order in (y - p, y, -p):
        rank = order.scatter(1, top[:, None], -torch.inf).argsort(dim=1, stable=True).argsort(1)
        found.append((rank[:, None] < sizes).to(y) / sizes)
    return torch.cat(found, 1)


def keep_top(p: Tensor, top: Tensor) -> Tensor:
    """`p` (B, K) with a margin between the class `top` (B,) and every other, taken from those that are too close."""
    margin = min(MARGIN, 0.01 / p.shape[1])
    highest = p.gather(1, top[:, None])
    others = torch.minimum(p, (highest - margin).clamp_min(0)).scatter(1, top[:, None], 0.0)
    return others.scatter(1, top[:, None], 1 - others.sum(1, keepdim=True))
