"""Fast data-free distillation: a generator that learns to be adapted quickly (Fang et al., AAAI 2022)."""

import math
from copy import deepcopy
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Fresh
from undistill.attacks.data_free.generative import Generative
from undistill.attacks.data_free.synthesis import (
    BatchNormStatistics,
    Generator,
    agreed_divergence,
    evaluating,
    shifted,
    to_bytes,
    without_images,
)
from undistill.core.spec import LearningRate, Temperature, Weight
from undistill.data.batches import Batch
from undistill.data.sheet import COLUMNS
from undistill.data.split import Samples, Split
from undistill.data.views import Views, to_float
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation
from undistill.training.objectives import Terms
from undistill.victims.oracle import Oracle


class Fast(Generative):
    """Every few steps a copy of a meta-generator and its noise are fitted in `inner` steps to the victim's classes, its
    batch-norm statistics and what the student gets right, but not as the victim does; the meta-generator moves towards
    the copy (Reptile), and the images go into a memory bank, from whose views the student learns. Needs weights,
    no data.

    Defaults are for a few thousand steps; the authors take 400 steps of the student for a batch of new images, T 20,
    statistics 10 and adversarial 1.33 (from memory).
    """

    inner: int = Field(5, ge=1, le=10_000)
    """Steps for a batch of images (Fast-5)."""
    every: int = Field(20, ge=1, le=1_000_000)
    """Steps of the student for a batch of new images."""
    warmup: int = Field(20, ge=1, le=10_000)
    """Batches of images before the student's first step, made without the student."""
    lr: LearningRate = 2e-3
    """Learning rate of the copy, with Adam; the noise has 5 times as much."""
    outer: float = Field(0.1, gt=0, le=1)
    """How far the meta-generator moves towards its copy."""
    one_hot: Weight = 0.5
    """Weight of cross-entropy against random classes."""
    statistics: Weight = 1.0
    """Weight of the distance to batch-norm statistics."""
    adversarial: Weight = 1.0
    """Weight of minus KL(victim || student) where both give the same top answer."""
    T: Temperature = 4.0
    bank: int = Field(20_000, ge=1, le=10_000_000)
    """Images that are remembered, the latest ones."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        victim = oracle.weights
        memory = _Memory(self.generator(data, fit), self.bank)

        def objective(network: nn.Module, batch: Batch) -> Terms:
            count = len(batch.images)
            if memory.steps == 0:
                for _ in range(self.warmup):
                    memory.keep(self._images(victim, None, memory.generator, count, data.num_classes))
            elif memory.steps % self.every == 0:
                memory.keep(self._images(victim, network, memory.generator, count, data.num_classes))
            memory.steps += 1
            images = memory.draw(count, fit.recipe.views, fit.seed)
            with torch.no_grad():
                answers = victim(images)
            return {"soft": distillation(answers, network(images), self.T)}

        beside = victim, memory.generator
        student = fit(fresh(), without_images(data), objective, beside=beside, carried=[memory], choose=False)
        fit.show(memory.images[-COLUMNS * COLUMNS :])
        return student

    def _images(
        self, victim: nn.Module, student: nn.Module | None, generator: Generator, count: int, num_classes: int
    ) -> Tensor:
        """uint8 images (B, C, H, W), those of the `inner` steps with the lowest loss; moves the meta-generator."""
        device = next(generator.parameters()).device
        labels = torch.randint(num_classes, (count,), device=device)
        noise = torch.randn(count, generator.latent, device=device).requires_grad_()
        copy = deepcopy(generator).train()
        groups: list[dict[str, Any]] = [{"params": copy.parameters()}, {"params": [noise], "lr": 5 * self.lr}]
        optimiser = torch.optim.Adam(groups, self.lr, betas=(0.5, 0.999))
        lowest = torch.tensor(math.inf, device=device)
        best: Tensor | None = None
        with BatchNormStatistics(victim) as norms, evaluating(student) as rival:
            for _ in range(self.inner):
                images = copy(noise)
                seen = shifted(images)
                answers = victim(seen)
                loss = self.one_hot * cross_entropy(answers, labels) + self.statistics * norms.distance
                if rival is not None:
                    loss = loss - self.adversarial * agreed_divergence(answers, rival(seen))
                made, reached = to_bytes(images), loss.detach()  # chosen on the device: nothing waits for a GPU
                best = made if best is None else torch.where(reached < lowest, made, best)
                lowest = torch.minimum(lowest, reached)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            for own, new in zip(generator.parameters(), copy.parameters(), strict=True):
                own.lerp_(new, self.outer)
        assert best is not None
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
