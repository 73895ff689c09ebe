"""ActiveThief (Pal et al., AAAI 2020): a thief who chooses what to ask."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Attack, Buying, Fresh, Role, ThiefData, tries
from undistill.core.seeds import derive
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.data.split import Samples, Split
from undistill.training.fit import Fit
from undistill.training.losses import distillation
from undistill.training.metrics import evaluate
from undistill.training.objectives import Terms
from undistill.victims.answer import Answer, Form
from undistill.victims.bought import Bought
from undistill.victims.oracle import Access, Oracle

PART = 1024  # points that are compared together

Strategy = Literal["random", "entropy", "k-centre", "bucket"]


class ActiveThief(Attack):
    """In rounds: a new student learns from all answers bought so far, then chooses the images of the pool to ask next.

    `entropy` asks where the student is least sure, `k-centre` where its answer is furthest from all that was bought,
    `bucket` near images to which the victim's own answer was least sure, for interfaces that show confidence coarsely.
    """

    needs = Access.QUERY
    data = ThiefData.SURROGATE
    role = Role.SURROGATE
    buying = Buying.CHOSEN
    space = tries(strategy=("random", "entropy", "k-centre", "bucket"))
    T: Temperature = 1.0
    strategy: Strategy = "entropy"
    rounds: int = Field(10, ge=1, le=1000)
    first: float = Field(0.1, gt=0, le=1)
    """Share of the budget that is spent at random in the first round."""

    @property
    def form(self) -> Form:  # type: ignore[override]
        """A bucket is read from the victim's confidence."""
        return Form.TOP if self.strategy == "bucket" else Form.LABEL

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        budget = len(data.train) if oracle.ledger.budget is None else min(oracle.ledger.budget, len(data.train))
        generator = torch.Generator().manual_seed(derive(fit.seed, "asked"))
        asked = torch.randperm(len(data.train), generator=generator)[: round(self.first * budget) or 1]
        bought = [oracle.once(data.train[asked], data.num_classes)]
        student = self._learn(fresh(), data, asked, bought, fit)
        for left in range(self.rounds - 1, 0, -1):
            more = (budget - len(asked)) // left
            if more == 0:
                continue
            chosen = self._choose(more, student, data.train, asked, Answer.joined(bought), generator)
            bought.append(oracle.once(data.train[chosen], data.num_classes))
            asked = torch.cat([asked, chosen])
            student = self._learn(fresh(), data, asked, bought, fit)
        return student

    def _learn(self, student: nn.Module, data: Split, asked: Tensor, bought: list[Answer], fit: Fit) -> nn.Module:
        """The student, trained on all images that were asked, in their order."""
        ask = Bought(Answer.joined(bought))

        def objective(student: nn.Module, batch: Batch) -> Terms:
            return {"soft": distillation(ask(batch).filled, student(batch.images), self.T)}

        return fit(student, replace(data, train=data.train[asked]), objective)

    def _choose(
        self, count: int, student: nn.Module, pool: Samples, asked: Tensor, bought: Answer, generator: torch.Generator
    ) -> Tensor:
        """Indices of `count` images of the pool to ask next."""
        others = torch.ones(len(pool), dtype=torch.bool)
        others[asked] = False
        left = others.nonzero().flatten()
        left = left[torch.randperm(len(left), generator=generator)]  # images of equal worth, in random order
        if self.strategy == "random":
            return left[:count]
        p = evaluate(student, pool).float().softmax(1).cpu()
        if self.strategy == "k-centre":
            return left[centres(p[left], p[asked], count)]
        if self.strategy == "entropy":
            worth = -(p[left] * p[left].clamp_min(1e-12).log()).sum(1)
        else:
            worth = -bought.log_p.cpu().max(1).values[nearest(p[left], p[asked])]
        return left[worth.argsort(descending=True, stable=True)[:count]]


def nearest(points: Tensor, others: Tensor) -> Tensor:
    """For each of `points` (N, K), the index of the nearest of `others` (M, K)."""
    return torch.cat([torch.cdist(part, others).argmin(1) for part in points.split(PART)])


def centres(points: Tensor, known: Tensor, count: int) -> Tensor:
    """Indices of `count` of `points` (N, K), each the furthest from `known` (M, K) and those chosen before it."""
    distance = torch.cat([torch.cdist(part, known).min(1).values for part in points.split(PART)])
    chosen = []
    for _ in range(count):
        furthest = int(distance.argmax())
        chosen.append(furthest)
        distance = torch.minimum(distance, (points - points[furthest]).norm(dim=1))
        distance[furthest] = -1.0
    return torch.tensor(chosen)
