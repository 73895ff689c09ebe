"""A chain of students, after sequential contrastive distillation for nasty teachers (Jandial et al., ECCV 2022)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Fresh, QueryAttack, Role, tries
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation
from undistill.training.objectives import Terms, Weighted
from undistill.victims.oracle import Oracle


class Chain(QueryAttack):
    """The first student imitates the victim, each later one the mean answer of all students before it; the last counts.

    It approximates the published attack, whose contrastive term no public code has. Only the first student asks.
    """

    role = Role.ADAPTIVE
    space = tries(n=(2, 3), T=(1.0, 4.0, 20.0), alpha=(0.5, 0.9))
    n: int = Field(3, ge=2, le=100)
    """Students in all."""
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)
    """Weight of imitation against the thief's own labels."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        ask = self.asking(oracle, data)

        def first(student: nn.Module, batch: Batch) -> Terms:
            return self._loss(student(batch.images), ask(batch).filled, batch.labels)

        def later(student: nn.Module, batch: Batch) -> Terms:
            answers = torch.stack([teacher(batch).float().log_softmax(1) for teacher in teachers])
            return self._loss(student(batch.images), answers.logsumexp(0), batch.labels)  # logits need no 1/n

        student = fit(fresh(), data, first, capturable=True)
        teachers = []
        for number in range(1, self.n):
            teachers.append(fit.answers(student))
            student = fit(fresh(number), data, later, capturable=True)
        return student

    def _loss(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Terms:
        soft, ce = distillation(teacher, logits, self.T), cross_entropy(logits, labels)
        return {"soft": Weighted(soft, self.alpha), "ce": Weighted(ce, 1 - self.alpha)}
