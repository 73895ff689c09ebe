"""Sealed answers: a calibrated answer that carries at most log2(levels) bits beyond its label. See docs/sealed.md."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from undistill.core.unshown import LOG_ZERO
from undistill.data.split import Split
from undistill.defences.defence import ResponseDefence, calibration_answer
from undistill.training.fit import Fit
from undistill.victims.answer import Answer
from undistill.victims.protected import Response

MARGIN = 0.01  # by which the top class is above every other, in shares of an even answer
BEYOND = 1e6  # log-odds that no answer has
DIFFERENT = 1.96  # standard errors by which the accuracies of two buckets differ, or they become one


class Sealed(ResponseDefence):
    """The answer is a function of its top class and of one of `levels` buckets of confidence, and of nothing else.

    So whatever a thief computes from an answer, however he chooses what to ask, he could compute from (label, bucket):
    an answer carries at most log2(levels) bits beyond its label, and n answers at most n log2(levels). The top class
    gets the accuracy that its bucket has on validation images, which calibrates it.
    """

    levels: int = Field(4, ge=1, le=64)
    """Buckets of equally many validation images; neighbours whose accuracies do not differ become one."""
    rest: Literal["uniform", "prior", "decoy"] = "uniform"
    """How the other classes share what is left: evenly, as frequent as they are, or all to the least similar class,
    which spoils naive imitation and costs likelihood."""

    @property
    def calibrated_on(self) -> str:
        return "validation"

    def least_images(self, num_classes: int) -> int:
        return max(self.levels, num_classes)

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return SealedAnswers(self.levels, num_classes)

    def calibrate(self, response: Response, current: nn.Module, data: Split, fit: Fit) -> None:
        assert isinstance(response, SealedAnswers)
        answer, labels = calibration_answer(current, data), data.validation.labels
        right = answer.top == labels
        edges = merged(quantiles(log_odds(answer), self.levels), log_odds(answer), right)
        bucket = torch.bucketize(log_odds(answer), edges)
        hits, counts = (torch.bincount(part, minlength=len(edges) + 1) for part in (bucket[right], bucket))
        response.seal(edges, sealed((hits + 1) / (counts + 2), self.rests(answer, labels)))

    def rests(self, answer: Answer, labels: Tensor) -> Tensor:
        """For each top class (K, K), how the others share what it leaves: rows sum to 1, 0 on the diagonal."""
        num_classes = answer.log_p.shape[1]
        if self.rest == "uniform":
            shares = torch.ones(num_classes, num_classes)
        elif self.rest == "prior":
            shares = (torch.bincount(labels, minlength=num_classes) + 1.0).expand(num_classes, -1).clone()
        else:
            shares = decoys(answer.filled, answer.top)
        shares.fill_diagonal_(0.0)
        return shares / shares.sum(1, keepdim=True)


class SealedAnswers(Response):
    """Looks the answer up by label and bucket."""

    edges: Tensor
    """Log-odds of the top class between buckets, ascending (levels - 1,); `BEYOND` where buckets became one."""
    table: Tensor
    """Log-probabilities (K, levels, K)."""

    def __init__(self, levels: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("edges", torch.full((levels - 1,), BEYOND))
        self.register_buffer("table", torch.zeros(num_classes, levels, num_classes).log_softmax(2))

    def seal(self, edges: Tensor, table: Tensor) -> None:
        """Take `edges` (L - 1,) and probabilities (K, L, K), of L levels or fewer."""
        self.edges[: len(edges)] = edges
        self.table[:, : table.shape[1]] = table.log().clamp_min(LOG_ZERO)

    @property
    def bits(self) -> float:
        return math.log2(int((self.edges < BEYOND).sum()) + 1)

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        bucket = torch.bucketize(log_odds(answer), self.edges)
        return Answer(self.table[answer.top, bucket], torch.ones_like(answer.shown), whole=True)


def log_odds(answer: Answer) -> Tensor:
    """Log-odds (N,) of the top class: they tell answers apart whose probability is 1 up to rounding."""
    log_p, top = answer.filled, answer.top[:, None]
    others = log_p.scatter(1, top, -torch.inf).logsumexp(1).clamp_min(LOG_ZERO)
    return log_p.gather(1, top).squeeze(1) - others


def quantiles(values: Tensor, levels: int) -> Tensor:
    """The edges (levels - 1,) between as many buckets of equally many `values` (N,), midway between two of them."""
    ordered = values.sort().values
    places = torch.arange(1, levels) * len(values) // levels
    return (ordered[places - 1] + ordered[places]) / 2


def merged(edges: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """`edges` without those between neighbouring buckets whose accuracies do not differ, the most alike first."""
    while len(edges):
        bucket = torch.bucketize(values, edges)
        hits, counts = (torch.bincount(part, minlength=len(edges) + 1) for part in (bucket[right], bucket))
        p, n = (hits + 1) / (counts + 2), counts + 2  # Agresti and Caffo 2000: no bucket is certain
        errors = (p * (1 - p) / n).unfold(0, 2, 1).sum(1).sqrt()
        apart = p.diff().abs() / errors
        if apart.min() >= DIFFERENT:
            break
        edges = torch.cat([edges[: apart.argmin()], edges[apart.argmin() + 1 :]])
    return edges


def decoys(log_p: Tensor, top: Tensor) -> Tensor:
    """One-hot rows (K, K): the class least like each top class, by the mean log-probabilities of its answers (N, K).

    A top class that no answer has takes that of all answers.
    """
    num_classes = log_p.shape[1]
    chosen = F.one_hot(top, num_classes).float()
    counts = chosen.sum(0)[:, None]
    means = torch.where(counts > 0, chosen.T @ log_p / counts.clamp_min(1), log_p.mean(0))
    least = means.fill_diagonal_(torch.inf).argmin(1)
    return F.one_hot(least, num_classes).float()


def sealed(accuracies: Tensor, rests: Tensor) -> Tensor:
    """Answers (K, L, K) for the accuracies (L,) of the buckets and the rests (K, K) of the classes.

    The top class gets the accuracy, and the other classes at most a little less than it: what exceeds that is spread
    over them evenly. Where all of them would exceed it, the top class gets a little more than they.
    """
    num_classes = len(rests)
    margin = MARGIN / num_classes
    top = accuracies.clamp_min((1 + (num_classes - 1) * margin) / num_classes)
    table = (1 - top)[None, :, None] * rests[:, None]
    others = ~torch.eye(num_classes, dtype=torch.bool)[:, None].expand_as(table)
    cap, mass = (top - margin)[None, :, None], (1 - top)[None, :, None]
    low, high = torch.zeros_like(mass).expand(num_classes, -1, 1), cap.expand(num_classes, -1, 1)
    for _ in range(60):  # how much is added to each class, found by halving
        added = (low + high) / 2
        total = ((table + added).minimum(cap) * others).sum(2, keepdim=True)
        low, high = torch.where(total < mass, added, low), torch.where(total < mass, high, added)
    spread = torch.where((table > cap).any(2, keepdim=True), (table + high).minimum(cap), table) * others
    spread = spread * (mass / spread.sum(2, keepdim=True).clamp_min(1e-30))
    return spread + torch.eye(num_classes)[:, None] * top[None, :, None]
