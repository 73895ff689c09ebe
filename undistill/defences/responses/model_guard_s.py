"""ModelGuard-S (Tang et al., USENIX Security 2024): answers quantised by a frozen codebook."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.data.split import Split
from undistill.defences.defence import ResponseDefence, calibration_answer
from undistill.training.fit import Fit
from undistill.victims.answer import Answer
from undistill.victims.protected import Response

SWEEPS = 100  # of k-medoids at most; it ends as soon as nothing changes


class ModelGuardS(ResponseDefence):
    """Each answer is replaced by the nearest of `codes` typical ones of its top class, in L1.

    As released, the codebook starts empty and grows with the queries, so that the first one of a class gets the clean
    answer and a thief chooses the centroids. Here they are medoids of the validation answers, and stay.
    """

    codes: int = Field(4, ge=1, le=64)
    """Typical answers of each class."""

    @property
    def calibrated_on(self) -> str:
        return "validation"

    def least_images(self, num_classes: int) -> int:
        return max(self.codes, num_classes)

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Quantised(self.codes, num_classes)

    def calibrate(self, response: Response, current: nn.Module, data: Split, fit: Fit) -> None:
        answer = calibration_answer(current, data)
        book = codebook(answer.filled.exp(), answer.top, self.codes)
        response.book.copy_(book)  # type: ignore[operator]


class Quantised(Response):
    """The nearest code of the top class."""

    book: Tensor
    """Probabilities (K, codes, K); a class with fewer different answers repeats some."""

    def __init__(self, codes: int, num_classes: int) -> None:
        super().__init__()
        even = torch.full((num_classes, num_classes), 1 / num_classes)
        self.register_buffer("book", even[:, None].repeat(1, codes, 1))

    @property
    def bits(self) -> float:
        return math.log2(max(len(codes.unique(dim=0)) for codes in self.book))

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        codes = self.book[answer.top]
        nearest = (codes - answer.filled.exp()[:, None]).abs().sum(2).argmin(1)
        p = codes.gather(1, nearest[:, None, None].expand(-1, 1, codes.shape[2]))[:, 0]
        return Answer(p.clamp_min(1e-30).log(), torch.ones_like(answer.shown), whole=True)


def codebook(p: Tensor, top: Tensor, codes: int) -> Tensor:
    """The medoids (K, codes, K) of the answers `p` (N, K) of each top class (N,).

    A class that no answer has at the top gets one code: the mean top probability, the rest spread evenly.
    """
    num_classes = p.shape[1]
    mean = p.amax(1).mean().clamp_min(1.01 / num_classes)
    book = torch.full((num_classes, codes, num_classes), float((1 - mean) / (num_classes - 1)))
    book.diagonal(dim1=0, dim2=2).fill_(mean)
    for label in top.unique().tolist():
        found = medoids(p[top == label], codes)
        book[label] = found[torch.arange(codes).clamp_max(len(found) - 1)]
    return book


def medoids(points: Tensor, count: int) -> Tensor:
    """`count` of the `points` (N, K), or all different ones, that are near to the others in L1, equal ones counted.

    The first is the most central one, each next the one furthest from those; then points and medoids are assigned in
    turn until nothing changes.
    """
    points, weights = points.unique(dim=0, return_counts=True)
    distance = torch.cdist(points, points, p=1)
    chosen = (distance @ weights.to(distance)).argmin()[None]
    while len(chosen) < min(count, len(points)):
        chosen = torch.cat([chosen, distance[:, chosen].amin(1).argmax()[None]])
    for _ in range(SWEEPS):
        own = distance[:, chosen].argmin(1)
        members = [(own == number).nonzero().flatten() for number in range(len(chosen))]
        costs = [distance[ours][:, ours] @ weights[ours].to(distance) for ours in members]
        moved = torch.stack([ours[cost.argmin()] for ours, cost in zip(members, costs, strict=True)])
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return points[chosen]
