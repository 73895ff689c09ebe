"""DIST: distillation from a stronger teacher (Huang et al., NeurIPS 2022)."""

import torch.nn.functional as F
from torch import Tensor, nn

from undistill.attacks.attack import Distillation, Role, tries
from undistill.core.spec import Temperature, Weight
from undistill.data.batches import Batch
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms, Weighted
from undistill.victims.answer import Answer, Form

EPSILON = 1e-6


class DIST(Distillation):
    """`CE + T^2 (beta (1 - correlation within images) + gamma (1 - correlation within classes))` (eq. 10).

    The student need not give the same probabilities, only such as rise and fall with the victim's: over the classes of
    an image, and over the images of a batch.
    """

    form = Form.TOP
    role = Role.PLAIN
    capturable = True
    space = tries(T=(1.0, 4.0), beta=(1.0, 2.0), gamma=(1.0, 2.0))
    T: Temperature = 4.0
    beta: Weight = 2.0
    gamma: Weight = 2.0

    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> Terms:
        logits = student(batch.images)
        p, q = (F.softmax(one.float() / self.T, 1) for one in (answer.filled, logits))
        scale = self.T**2
        return {
            "images": Weighted(1 - correlation(p, q).mean(), scale * self.beta),
            "classes": Weighted(1 - correlation(p.T, q.T).mean(), scale * self.gamma),
            "ce": cross_entropy(logits, batch.labels),
        }


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of `a` with the same row of `b`; 0 for a row that is constant."""
    a, b = (one - one.mean(1, keepdim=True) for one in (a, b))
    squares = (a.square().sum(1) + EPSILON**2) * (b.square().sum(1) + EPSILON**2)  # a root of 0 has no gradient
    return (a * b).sum(1) / squares.sqrt()
