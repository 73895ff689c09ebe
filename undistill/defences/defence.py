"""`Defence`: how a network becomes a victim that teaches badly."""

from abc import abstractmethod

from torch import nn

from undistill.core.spec import Spec
from undistill.data.split import Split
from undistill.training.fit import Fit


class Defence(Spec):
    """Fields are hyper-parameters; the problem comes as arguments."""

    @property
    def reference(self) -> str | None:
        """A run folder whose network takes the place of the honest one; by default none does."""
        return None

    @abstractmethod
    def protect(self, teacher: nn.Module, honest: nn.Module, fresh: nn.Module, data: Split, fit: Fit) -> nn.Module:
        """The protected network.

        `teacher` is the network to protect and stays as it is; `honest` is the normally trained network to differ from,
        `teacher` itself unless there is a `reference`; `fresh` is the same architecture newly initialised.
        """
