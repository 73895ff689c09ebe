"""Knockoff Nets (Orekondy et al., CVPR 2019), with images drawn at random."""

from torch import nn

from undistill.attacks.attack import Attack, Buying, Fresh, Role, ThiefData, tries
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import distillation
from undistill.training.objectives import Terms
from undistill.victims.bought import Bought
from undistill.victims.oracle import Access, Oracle


class Knockoff(Attack):
    """`T^2 KL(victim/T || student/T)` on images of a pool, as many as the budget buys, each of them asked once."""

    needs = Access.QUERY
    data = ThiefData.SURROGATE
    role = Role.SURROGATE
    buying = Buying.ONCE
    space = tries(T=(1.0, 4.0))
    T: Temperature = 1.0

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        bought = Bought.of(oracle, data)

        def objective(student: nn.Module, batch: Batch) -> Terms:
            return {"soft": distillation(bought(batch).filled, student(batch.images), self.T)}

        return fit(fresh(), data, objective, capturable=True)
