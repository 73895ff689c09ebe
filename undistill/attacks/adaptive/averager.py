"""Mean answers of a class, in which what a nasty teacher does to single answers is lost."""

from pydantic import Field
from torch import nn

from undistill.attacks.attack import Fresh, QueryAttack, Role, tries
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.class_means import ClassMeans
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

        return fit(fresh(), data, objective, capturable=True)
