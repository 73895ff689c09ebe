"""MKD: a map of answers by a Markov matrix for each label (ECCV 2024).

A US patent application (US 2025/0348752 A1) covers this attack. It is here so that a defence can be measured against
it, and in no suite that is run by default.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Fresh, QueryAttack, Role, tries
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation, kl
from undistill.training.objectives import Terms, Weighted
from undistill.training.optimisers import ADAM_LR, Extra
from undistill.victims.answer import Form
from undistill.victims.oracle import Oracle

DIAGONAL = 3.0  # of a new matrix before its softmax, beyond log(K - 1): 0.95 after it, whatever the number of classes


class MKD(QueryAttack):
    """The student imitates `M_y p^(1/tau)`; the matrix M_y of the label moves to where it helps the student.

    Every column of M_y is a distribution: softmax of `s_y I + U_y V_y^T`, of low rank. M_y learns to make answers like
    the student's own.
    """

    form = Form.TOP
    role = Role.ADAPTIVE
    space = tries(T=(1.0, 4.0), alpha=(0.5, 0.9), tau=(0.5, 1.0, 4.0))
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)
    """Weight of imitation against the thief's own labels."""
    tau: Temperature = 1.0
    rank: int = Field(3, ge=1, le=1000)
    speed: float = Field(0.01, gt=0, le=1)
    """Learning rate of the matrices, with Adam, as a share of the student's."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        ask, matrices = self.asking(oracle, data), Markov(data.num_classes, self.rank)

        def objective(student: nn.Module, batch: Batch) -> Terms:
            logits = student(batch.images)
            mapped = matrices(ask(batch).filled / self.tau, batch.labels)
            soft, ce = distillation(mapped.detach(), logits, self.T), cross_entropy(logits, batch.labels)
            return {
                "soft": Weighted(soft, self.alpha),
                "ce": Weighted(ce, 1 - self.alpha),
                "map": kl(logits.detach(), mapped),
            }

        scale = self.speed * fit.recipe.lr / ADAM_LR
        extra = [Extra(matrices, "adam", lr_scale=scale, decay=0.0)]
        return fit(fresh(), data, objective, extra=extra, capturable=True)


class Markov(nn.Module):
    """One column-stochastic K x K matrix for each of K labels."""

    def __init__(self, num_classes: int, rank: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((num_classes,), DIAGONAL + math.log(num_classes - 1)))
        self.u = nn.Parameter(torch.randn(num_classes, num_classes, rank) / num_classes)
        self.v = nn.Parameter(torch.randn(num_classes, num_classes, rank) / num_classes)

    def of(self, label: Tensor) -> Tensor:
        """Log of the matrices (B, K, K) of labels (B,); each column sums to 1."""
        eye = torch.eye(len(self.s), device=self.s.device)
        return F.log_softmax(self.s[label, None, None] * eye + self.u[label] @ self.v[label].mT, 1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log of M_y p, (B, K), for p = softmax(logits (B, K)). Of shares (B, K) for labels the largest counts."""
        label = labels.argmax(1) if labels.ndim == 2 else labels
        log_p = F.log_softmax(logits.float(), 1)
        return torch.logsumexp(self.of(label) + log_p[:, None, :], 2)
