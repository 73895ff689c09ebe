"""`Defence`: how a network becomes a victim that teaches badly."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import nn

from undistill.core.errors import DataError
from undistill.core.spec import Spec
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.victims.answer import Answer
from undistill.victims.protected import Protected, Response, with_response
from undistill.victims.victim import NetworkVictim

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

    def check(self, current: nn.Module, data: Split) -> None:
        """Raise an error for what cannot be done with this network and these images, before anything is trained."""

    @abstractmethod
    def protect(self, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        """The protected network; `current` and `honest` stay as they are.

        Args:
            current: the network to protect, in eval mode, as earlier defences left it. A defence that trains a fresh
                network instead undoes what they trained.
            honest: a normally trained network: the unprotected one, or that of `reference`.
            fresh: gives new networks of the same architecture, for defences that train from scratch.
            data: the owner's training and validation images, never the test images.
            fit: the training loop.
        """


class ResponseDefence(Defence):
    """A defence that changes answers only: a `Response` over the network, whose weights stay."""

    listed = False
    keeps_top: ClassVar[bool] = True
    """Whether the top class never changes. An audit measures how often it does."""

    @property
    def calibrated_on(self) -> str:
        """Images of the owner's by which `calibrate` sets the response: "validation" or "training"; empty for none."""
        return ""

    def least_images(self, num_classes: int) -> int:
        """How many validation images calibration needs."""
        return 1

    @abstractmethod
    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        """The response before it is calibrated, for inputs of `shape` (C, H, W): its structure."""

    def calibrate(self, response: Response, current: nn.Module, data: Split, fit: Fit) -> None:
        """Set the tables, or train the networks, of `response`, whose answers will be those of `current`."""

    def check(self, current: nn.Module, data: Split) -> None:
        least, images = self.least_images(data.num_classes), len(data.validation)
        if images < least:
            raise DataError(
                f"{self} is calibrated on validation images, needs {least} of them for {data.num_classes} classes, and "
                f"there are {images}. Add images, or give more of them to validation."
            )
        self.response(data.shape, data.num_classes)

    def wrap(self, current: nn.Module, shape: tuple[int, int, int], num_classes: int) -> Protected:
        """`current` with this response over it."""
        return with_response(current, self.response(shape, num_classes))

    def protect(self, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        """`current` with the calibrated response over it."""
        protected = self.wrap(current, data.shape, data.num_classes).to(fit.device)
        response: Response = protected.responses[-1]  # type: ignore[assignment]
        self.calibrate(response, current.to(fit.device), data, fit)
        return protected.eval().requires_grad_(False)


def calibration_answer(current: nn.Module, data: Split) -> Answer:
    """The answer (N, K) of `current` to the validation images, in main memory."""
    log_p, shown, whole = NetworkVictim.of(current).answer_samples(data.validation, data.num_classes)
    return Answer(log_p.cpu(), shown.cpu(), whole)
