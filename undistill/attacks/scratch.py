"""The floor of an attacker with labels: no victim at all."""

from collections.abc import Mapping

from torch import Tensor, nn

from undistill.attacks.attack import Attack
from undistill.data import Split
from undistill.fit import Fit
from undistill.losses import cross_entropy
from undistill.oracle import Access, Oracle
from undistill.stream import Batch


class Scratch(Attack):
    """Cross-entropy on the attacker's own labels."""

    needs = Access.NONE
    floor = True

    def run(self, oracle: Oracle, student: nn.Module, data: Split, fit: Fit) -> nn.Module:
        def objective(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            return {"ce": cross_entropy(network(batch.images), batch.labels)}

        return fit(student, data, objective)
