"""A map that undoes what a defence did to answers, learnt on the thief's labels (vector scaling, Guo et al. 2017)."""

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
from undistill.training.optimisers import Extra
from undistill.victims.answer import Answer, Form
from undistill.victims.oracle import Oracle

FLOOR = -20.0  # of a log-probability, so that one that is nearly 0 cannot drive the whole map


class AffineMap(QueryAttack):
    """Log-answers pass through a scale and a shift for each class, others for each top answer of the victim.

    The map is trained to give the thief's labels; the student imitates what it makes of the answers. It is conditioned
    on the victim's top answer, since on the true label it would collapse to that label. It inverts temperatures and
    reversed rankings, and with `matrix` answers whose classes were exchanged.
    """

    form = Form.TOP
    role = Role.ADAPTIVE
    space = tries(T=(1.0, 4.0), alpha=(0.5, 0.9), speed=(0.3, 1.0, 10.0), matrix=(False, True))
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)
    """Weight of imitation against the thief's own labels."""
    speed: float = Field(1.0, ge=0.001, le=1000)
    """Factor of the map's learning rate, with Adam at 1e-3."""
    matrix: bool = False
    """Let each class read the log-answers of all, by one matrix for all top answers."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        affine, ask = Affine(data.num_classes, matrix=self.matrix), self.asking(oracle, data)

        def objective(student: nn.Module, batch: Batch) -> Terms:
            mapped, logits = affine(ask(batch)), student(batch.images)
            soft = distillation(mapped.detach(), logits, self.T)
            return {
                "soft": Weighted(soft, self.alpha),
                "ce": Weighted(cross_entropy(logits, batch.labels), 1 - self.alpha),
                "map": cross_entropy(mapped, batch.labels),
            }

        extra = [Extra(affine, "adam", lr_scale=self.speed, decay=0.0)]
        return fit(fresh(), data, objective, extra=extra, capturable=True)


class Affine(nn.Module):
    """`scale[top] * log p + shift[top]`, where `log p` may be multiplied by a matrix: at first the identity."""

    def __init__(self, num_classes: int, *, matrix: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes, num_classes))
        self.shift = nn.Parameter(torch.zeros(num_classes, num_classes))
        self.mix = nn.Parameter(torch.eye(num_classes)) if matrix else None

    def forward(self, answer: Answer) -> Tensor:
        """Logits (B, K)."""
        log_p = answer.filled.clamp_min(FLOOR)
        if self.mix is not None:
            with torch.autocast(log_p.device.type, enabled=False):  # a product would be bf16
                log_p = log_p @ self.mix
        return self.scale[answer.top] * log_p + self.shift[answer.top]
