"""The common base of attacks with a generator."""

from pydantic import Field

from undistill.attacks.attack import Attack, Role, ThiefData
from undistill.attacks.data_free.synthesis import Generator
from undistill.core.spec import LearningRate
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.victims.oracle import Access


class Generative(Attack):
    """An attack whose images come from a generator. Needs weights, no data."""

    listed = False
    needs = Access.WEIGHTS
    data = ThiefData.NONE
    role = Role.DATA_FREE
    lr: LearningRate = 1e-3
    """Learning rate of the generator, with Adam."""
    latent: int = Field(100, ge=1, le=10_000)
    width: int = Field(64, ge=1, le=1024)
    """Channels of the generator."""

    def generator(self, data: Split, fit: Fit) -> Generator:
        """A new one, of images like those of `data`."""
        return Generator(data.shape, self.latent, self.width).to(fit.device)
