"""The floor of any attacker who can query: the victim's top answer alone."""

from collections.abc import Mapping

from torch import Tensor, nn

from undistill.attacks.attack import Attack
from undistill.data import Split
from undistill.fit import Fit
from undistill.losses import cross_entropy
from undistill.oracle import Access, Oracle
from undistill.stream import Batch


class HardLabels(Attack):
    """Cross-entropy on the argmax of the victim's answer to each view; needs no labels."""

    needs = Access.QUERY
    floor = True

    def run(self, oracle: Oracle, student: nn.Module, data: Split, fit: Fit) -> nn.Module:
        def objective(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            return {"ce": cross_entropy(network(batch.images), oracle(batch).argmax(1))}

        return fit(student, data, objective)
