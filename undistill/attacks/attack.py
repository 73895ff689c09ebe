"""`Attack`: how a student is taught from a victim's answers."""

from abc import abstractmethod
from typing import ClassVar

from torch import nn

from undistill.core.spec import Spec
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.victims.oracle import Access, Oracle


class Attack(Spec):
    """Fields are hyper-parameters; the problem comes as arguments; an attack never grades itself."""

    needs: ClassVar[Access] = Access.NONE
    """The access that the oracle must grant."""
    floor: ClassVar[bool] = False
    """A yardstick that no accuracy-preserving defence can stop, rather than a way to break one."""

    def check(self, victim: nn.Module) -> None:
        """`ModelError` for a victim on which it cannot be tried; an audit asks before it trains anything."""

    @abstractmethod
    def run(self, oracle: Oracle, student: nn.Module, data: Split, fit: Fit) -> nn.Module:
        """Train `student` against `oracle` on the attacker's own `data`; return it."""
