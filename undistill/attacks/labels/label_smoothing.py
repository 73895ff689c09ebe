"""The stronger floor of an attacker with labels."""

from pydantic import Field
from torch import nn

from undistill.attacks.attack import Attack, Fresh, Role, tries
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms
from undistill.victims.oracle import Oracle


class LabelSmoothing(Attack):
    """Cross-entropy on the attacker's own labels, `smoothing` of it spread over all classes (Szegedy 2016)."""

    role = Role.LABELS
    space = tries(smoothing=(0.05, 0.1, 0.2, 0.4, 0.6))
    smoothing: float = Field(0.1, gt=0, lt=1)

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        def objective(network: nn.Module, batch: Batch) -> Terms:
            return {"ce": cross_entropy(network(batch.images), batch.labels, self.smoothing)}

        return fit(fresh(), data, objective, capturable=True)
