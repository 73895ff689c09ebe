"""Fast data-free distillation: a generator that learns to be adapted quickly (Fang et al., AAAI 2022)."""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.generative import Generative
from undistill.data import Samples, Split
from undistill.errors import NonFiniteLoss
from undistill.fit import Fit
from undistill.losses import cross_entropy, distillation
from undistill.oracle import Oracle
from undistill.stream import Batch
from undistill.synthesis import (
    BatchNormStatistics,
    Generator,
    disagreement,
    to_bytes,
    without_data,
)
from undistill.views import Views, to_float


class Fast(Generative):
    """Every few steps a copy of a meta-generator and its noise are fitted in `inner` steps to the victim's classes, its
    batch-norm statistics and the student's disagreement (1 - JS); the meta-generator moves towards the copy (Reptile),
    and the images go into a memory bank, from whose views the student learns. Needs weights, no data."""

    inner: int = Field(5, ge=1)
    """Steps for a batch of images (Fast-5)."""
    every: int = Field(5, ge=1)
    """Steps of the student for a batch of new images."""
    lr: float = Field(2e-3, gt=0)
    """Of copy and noise, with Adam; noise 10 times."""
    outer: float = Field(0.1, gt=0, le=1)
    """How far the meta-generator moves towards its copy."""
    one_hot: float = Field(0.5, ge=0)
    statistics: float = Field(1.0, ge=0)
    adversarial: float = Field(1.0, ge=0)
    T: float = Field(4.0, gt=0)
    bank: int = Field(20_000, ge=1)
    """Images that are remembered, the latest ones."""

    def run(self, oracle: Oracle, student: nn.Module, data: Split, fit: Fit) -> nn.Module:
        victim = oracle.weights
        memory = _Memory(self.generator(data, fit), self.bank)
        data, fit = without_data(data, fit, memory)

        def objective(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            if memory.steps % self.every == 0:
                memory.keep(self._imagine(victim, network, memory.generator, len(batch.images), data.num_classes))
            memory.steps += 1
            images = memory.draw(len(batch.images), fit.recipe.views, fit.seed)
            with torch.no_grad():
                answers = victim(images)
            return {"soft": distillation(answers, network(images), self.T)}

        student = fit(student, data, objective)
        fit.show(memory.images)
        return student

    def _imagine(
        self, victim: nn.Module, student: nn.Module, generator: Generator, count: int, num_classes: int
    ) -> Tensor:
        """uint8 images (B, C, H, W), those of the `inner` steps with the lowest loss; moves the meta-generator."""
        device = next(generator.parameters()).device
        labels = torch.randint(num_classes, (count,), device=device)
        noise = torch.randn(count, generator.latent, device=device).requires_grad_()
        copy = deepcopy(generator).train()
        groups: list[dict[str, Any]] = [{"params": copy.parameters()}, {"params": [noise], "lr": 10 * self.lr}]
        optimiser = torch.optim.Adam(groups, self.lr)
        training, lowest = student.training, float("inf")
        student.eval()
        with BatchNormStatistics(victim) as norms:
            for _ in range(self.inner):
                images = copy(noise)
                answers = victim(images)
                loss = self.one_hot * cross_entropy(answers, labels) + self.statistics * norms.distance
                loss = loss + self.adversarial * disagreement(answers, student(images))
                reached = loss.item()
                if not math.isfinite(reached):
                    raise NonFiniteLoss("Fast cannot fit images: victim or student answers NaN. Lower recipe.lr.")
                if reached < lowest:
                    lowest, best = reached, to_bytes(images)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        student.train(training)
        with torch.no_grad():
            for own, new in zip(generator.parameters(), copy.parameters(), strict=True):
                own.lerp_(new, self.outer)
        return best


class _Memory:
    """The meta-generator and the bank of its images, saved and restored with every checkpoint."""

    def __init__(self, generator: Generator, size: int) -> None:
        self.generator, self.size = generator, size
        self.images = torch.empty(0, dtype=torch.uint8)
        self.steps = 0

    def keep(self, images: Tensor) -> None:
        held = [self.images.to(images.device)] if len(self.images) else []
        self.images = torch.cat([*held, images])[-self.size :]

    def draw(self, count: int, views: Views, seed: int) -> Tensor:
        """Views of random images (B, C, H, W) in [0, 1]."""
        index = torch.randint(len(self.images), (count,), device=self.images.device)
        blank = torch.zeros(len(self.images), dtype=torch.int64, device=index.device)
        return to_float(views(Samples(self.images, blank), seed, self.steps, index, num_classes=1)[0])

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict(), "images": self.images, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.images, self.steps = state["images"], state["steps"]
