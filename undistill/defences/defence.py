"""`Defence`: how a teacher becomes a victim that teaches badly."""

from abc import abstractmethod

from torch import nn

from undistill.data import Split
from undistill.fit import Fit
from undistill.spec import Spec


class Defence(Spec):
    """Fields are hyper-parameters; the problem comes as arguments."""

    @abstractmethod
    def protect(self, teacher: nn.Module, fresh: nn.Module, data: Split, fit: Fit) -> nn.Module:
        """The protected network. `teacher` is the honest one and stays as it is; `fresh` is the same
        architecture newly initialised, for defences that train from scratch."""
