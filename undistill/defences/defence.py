"""`Defence`: how a network becomes a victim that teaches badly."""

from abc import abstractmethod
from collections.abc import Callable

from torch import nn

from undistill.core.spec import Spec
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.victims.protected import Protected, Response, with_response

Fresh = Callable[[], nn.Module]
"""Gives a new network of the same architecture, another one at each call, the same for the same seed."""


class Defence(Spec):
    """Fields are hyper-parameters; the problem comes as arguments."""

    @property
    def reference(self) -> str | None:
        """A run folder whose network takes the place of the honest one; by default none does."""
        return None

    def wrap(self, current: nn.Module, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """The structure that this defence gives to `current`, by default none.

        Loading a run rebuilds it, so a defence that returns another structure than it was given must say so here.
        """
        return current

    @abstractmethod
    def protect(self, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        """The protected network; `current` and `honest` stay as they are.

        Args:
            current: the network to protect, in eval mode, as earlier defences left it. A defence that trains gets it
                without their responses; if it trains a fresh network instead, it undoes what they trained.
            honest: a normally trained network: the unprotected one, or that of `reference`.
            fresh: gives new networks of the same architecture, for defences that train from scratch.
            data: the owner's training and validation images, never the test images.
            fit: the training loop.
        """


class ResponseDefence(Defence):
    """A defence that changes answers only: a `Response` over the network, whose weights stay."""

    listed = False

    @abstractmethod
    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        """The response before it is calibrated, for inputs of `shape` (C, H, W): its structure."""

    def wrap(self, current: nn.Module, shape: tuple[int, int, int], num_classes: int) -> Protected:
        """`current` with this response over it."""
        return with_response(current, self.response(shape, num_classes))

    def protect(self, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        """A response that needs no calibration is done as soon as it is over the network."""
        return self.wrap(current, data.shape, data.num_classes).to(fit.device).eval()
