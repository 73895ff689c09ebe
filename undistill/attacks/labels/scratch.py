"""The floor of an attacker with labels: no victim at all."""

from torch import nn

from undistill.attacks.attack import Attack, Fresh, Role
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms
from undistill.victims.oracle import Oracle


class Scratch(Attack):
    """Cross-entropy on the attacker's own labels."""

    role = Role.NO_TEACHER

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        def objective(network: nn.Module, batch: Batch) -> Terms:
            return {"ce": cross_entropy(network(batch.images), batch.labels)}

        return fit(fresh(), data, objective, capturable=True)
