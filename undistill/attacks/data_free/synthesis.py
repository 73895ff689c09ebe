"""Images made from a network alone, for attacks that have its weights and no data."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from undistill.data.split import Samples, Split
from undistill.training.losses import kl


class Generator(nn.Module):
    """Noise (B, latent) -> images (B, C, H, W) in [0, 1]: as in DAFL (Chen et al., ICCV 2019), ending in a sigmoid."""

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        super().__init__()
        channels, height, width_ = shape
        self.latent, self.start = latent, (2 * width, math.ceil(height / 4), math.ceil(width_ / 4))
        half = (math.ceil(height / 2), math.ceil(width_ / 2))
        self.expand = nn.Linear(latent, math.prod(self.start))
        self.body = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(half),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample((height, width_)),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.Sigmoid(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.body(self.expand(noise).view(-1, *self.start))
        return images.float()

    def noise(self, count: int) -> Tensor:
        return torch.randn(count, self.latent, device=self.expand.weight.device)

    def sample(self, count: int) -> Tensor:
        """Images of fresh noise."""
        images: Tensor = self(self.noise(count))
        return images


class GeneratorTraining:
    """A generator with its optimiser, saved and restored with every checkpoint."""

    def __init__(self, generator: Generator, lr: float) -> None:
        self.generator = generator
        self.optimiser = torch.optim.Adam(generator.parameters(), lr)

    def learn(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    @torch.no_grad()
    def pictures(self) -> Tensor:
        """Some of its images, uint8 (N, C, H, W)."""
        return to_bytes(self.generator.sample(64))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.optimiser.load_state_dict(state["optimiser"])


def without_images(data: Split) -> Split:
    """Blank images without labels in the place of the training images.

    An epoch has as many steps as the images would give. Validation images are only measured on.
    """
    blank = torch.zeros(1, *data.shape, dtype=torch.uint8).expand(len(data.train), *data.shape)
    return replace(data, train=Samples(blank, data.train.labels)).unlabelled


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Batch norms that keep running statistics."""
    return [
        module for module in network.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


class BatchNormStatistics:
    """How far the statistics of a batch are from those that a network's batch norms remember.

    `sum_l ||mean_l(x) - running mean_l||_2 + ||var_l(x) - running var_l||_2` (DeepInversion, Yin et al.,
    CVPR 2020, eq. 4), of the last call of the network; 0 for a network without batch norm.
    """

    def __init__(self, network: nn.Module) -> None:
        self._distances: dict[nn.Module, Tensor] = {}
        self._handles = [norm.register_forward_pre_hook(self._look) for norm in batch_norms(network)]

    def _look(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        values = inputs[0].float()
        others = [0, *range(2, values.dim())]
        mean, variance = values.mean(others), values.var(others, unbiased=False)
        self._distances[norm] = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()

    @property
    def distance(self) -> Tensor:
        return torch.stack([*self._distances.values()]).sum() if self._distances else torch.zeros(())

    def __enter__(self) -> "BatchNormStatistics":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of (B, C, H, W)."""
    return (images.diff(dim=2)).abs().mean() + (images.diff(dim=3)).abs().mean()


def disagreement(teacher: Tensor, student: Tensor, T: float = 3.0) -> Tensor:
    """1 - JS(teacher, student), which is small where they disagree; in nats over log 2, from logits (B, K)."""
    p, q = F.log_softmax(teacher.float() / T, 1), F.log_softmax(student.float() / T, 1)
    middle = torch.logaddexp(p, q) - math.log(2)
    halves = [F.kl_div(middle, one, reduction="batchmean", log_target=True) for one in (p, q)]
    return 1 - (torch.stack(halves).mean() / math.log(2)).clamp(0, 1)


def agreed_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) from logits (B, K), mean over all images; 0 for those on whose top answer they differ.

    What is fitted to be large here is hard for the student and not lost on the teacher (CMI, Fang et al., IJCAI 2021).
    """
    same = teacher.argmax(1) == student.argmax(1)
    return kl(teacher, torch.where(same.unsqueeze(1), student, teacher))


def shifted(images: Tensor) -> Tensor:
    """All rolled by up to two pixels in either direction, so that no pixel counts by its place alone."""
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return images.roll((down, right), (2, 3))


@contextmanager
def evaluating(network: nn.Module | None) -> Iterator[nn.Module | None]:
    """Inside, the network is in eval mode."""
    if network is None:
        yield None
        return
    training = network.training
    network.eval()
    try:
        yield network
    finally:
        network.train(training)


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return (images.detach() * 255).round().clamp(0, 255).to(torch.uint8)
