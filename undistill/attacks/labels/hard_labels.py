"""The floor of any attacker who can query: the victim's top answer alone."""

from torch import nn

from undistill.attacks.attack import Attack
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit, Terms
from undistill.training.losses import cross_entropy
from undistill.victims.oracle import Access, Oracle


class HardLabels(Attack):
    """Cross-entropy on the argmax of the victim's answer to each view; needs no labels."""

    needs = Access.QUERY
    floor = True

    def run(self, oracle: Oracle, student: nn.Module, data: Split, fit: Fit) -> nn.Module:
        def objective(network: nn.Module, batch: Batch) -> Terms:
            return {"ce": cross_entropy(network(batch.images), oracle(batch).argmax(1))}

        return fit(student, data, objective)
