"""Mean answers of a class, in which what a nasty teacher does to single answers is lost."""

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


class Averager(QueryAttack):
    """The student imitates the mean answer of its label's class, which runs over the epoch, instead of each answer."""

    role = Role.ADAPTIVE
    space = tries(T=(1.0, 4.0, 20.0), alpha=(0.5, 0.9))
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)
    """Weight of imitation against the thief's own labels."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        ask, means = self.asking(oracle, data), ClassMeans(data.num_classes, fit.device)

        def objective(student: nn.Module, batch: Batch) -> Terms:
            logits = student(batch.images)
            target = means(ask(batch).filled, batch.labels, batch.epoch)
            soft, ce = distillation(target, logits, self.T), cross_entropy(logits, batch.labels)
            return {"soft": Weighted(soft, self.alpha), "ce": Weighted(ce, 1 - self.alpha)}

        return fit(fresh(), data, objective)


class ClassMeans:
    """Mean probabilities of the images of each class that were seen in this epoch."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_classes, num_classes, device=device)
        self.counts = torch.zeros(num_classes, 1, device=device)
        self.epoch = -1

    def __call__(self, log_p: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Log of the mean answer (B, K) of each label's class; the answers `log_p` (B, K) are among those averaged.

        labels: (B,), or shares (B, K), by which an answer counts for several classes.
        """
        if epoch != self.epoch:
            self.sums, self.counts, self.epoch = torch.zeros_like(self.sums), torch.zeros_like(self.counts), epoch
        shares = labels if labels.ndim == 2 else torch.zeros_like(log_p).scatter(1, labels[:, None], 1.0)
        with torch.autocast(log_p.device.type, enabled=False):  # products would be bf16
            self.sums = self.sums + shares.T @ log_p.exp()
            self.counts = self.counts + shares.sum(0)[:, None]
            return (shares @ (self.sums / self.counts.clamp_min(1e-12))).clamp_min(1e-30).log()
