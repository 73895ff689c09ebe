"""DeepInversion: images optimised until the victim recognises them (Yin et al., CVPR 2020)."""

from dataclasses import replace
from functools import partial
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from undistill.attacks.attack import Attack, Fresh, Role, ThiefData
from undistill.attacks.data_free.synthesis import (
    BatchNormStatistics,
    batch_norms,
    disagreement,
    shifted,
    to_bytes,
    total_variation,
)
from undistill.core.errors import Unsuitable
from undistill.core.spec import LearningRate, Temperature, Weight
from undistill.data.batches import Batch
from undistill.data.split import Samples, Split
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation
from undistill.training.objectives import Terms
from undistill.victims.oracle import Access, Oracle

BATCH = 200


class DeepInversion(Attack):
    """Pixels that minimise the victim's cross-entropy for given classes, the distance of its batch-norm statistics,
    total variation (absolute, in two directions) and l2; in later rounds also the student's agreement (adaptive).
    The student then imitates the victim on those images. Needs weights, with batch norm unless statistics=0; no
    data."""

    needs = Access.WEIGHTS
    data = ThiefData.NONE
    role = Role.DATA_FREE
    count: int = Field(2000, ge=2, le=10_000_000)
    """Images in all, classes in turn."""
    steps: int = Field(200, ge=1, le=1_000_000)
    """Steps of Adam for each batch of images."""
    lr: LearningRate = 0.05
    statistics: Weight = 1.0
    variation: Weight = 1.0
    l2: Weight = 0.001
    rounds: int = Field(2, ge=1, le=1000)
    """Rounds of images. Those of the first are made without the student, which then learns from all so far."""
    competition: Weight = 1.0
    """Weight of 1 - JS(victim, student) in later rounds (eq. 7)."""
    T: Temperature = 4.0

    @model_validator(mode="after")
    def _something_in_each_round(self) -> Self:
        if self.count < 2 * self.rounds:
            raise ValueError(f"{self.rounds} rounds need at least {2 * self.rounds} images (count)")
        return self

    def check(self, victim: nn.Module | None, fresh: Fresh) -> None:
        if self.statistics and victim is not None and not batch_norms(victim):
            raise Unsuitable(
                "DeepInversion reads the statistics of batch norms, and the victim has none. It can do without: "
                "DeepInversion(statistics=0)."
            )

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        victim = oracle.weights
        self.check(victim, fresh)
        student, made = fresh(), list[Tensor]()
        for number in range(self.rounds):
            rival = student if number else None
            make = partial(self._images, victim, rival, number, data, fit)
            made.append(fit.once(f"images-{number}", make, (share(self.count, number, self.rounds), *data.shape)))
            pixels = torch.cat(made)
            split = replace(data, train=Samples(pixels.cpu(), torch.zeros(len(pixels), dtype=torch.int64)).unlabelled)

            def objective(network: nn.Module, batch: Batch) -> Terms:
                with torch.no_grad():
                    answers = victim(batch.images)
                return {"soft": distillation(answers, network(batch.images), self.T)}

            epochs = share(fit.recipe.epochs, number, self.rounds)
            student = fit(student, split, objective, beside=[victim], epochs=epochs, choose=False)
        fit.show(pixels)
        return student

    def _images(self, victim: nn.Module, student: nn.Module | None, number: int, data: Split, fit: Fit) -> Tensor:
        """uint8 images of one round (N, C, H, W), the classes in turn."""
        first = sum(share(self.count, earlier, self.rounds) for earlier in range(number))
        labels = torch.arange(first, first + share(self.count, number, self.rounds), device=fit.device)
        parts = (labels % data.num_classes).split(BATCH)
        done = []
        with fit.progress.task("inverting", len(parts)) as task:
            for part in parts:
                done.append(self._invert(victim, student, part, data.shape))
                task.advance()
        return torch.cat(done)

    def _invert(self, victim: nn.Module, student: nn.Module | None, labels: Tensor, shape: tuple[int, ...]) -> Tensor:
        """uint8 images (B, C, H, W) of the classes `labels` (B,)."""
        pixels = torch.rand(len(labels), *shape, device=labels.device).requires_grad_()
        optimiser = torch.optim.Adam([pixels], self.lr)
        with BatchNormStatistics(victim) as norms:
            for _ in range(self.steps):
                images = shifted(pixels)
                answers = victim(images)
                loss = cross_entropy(answers, labels) + self.statistics * norms.distance
                loss = loss + self.variation * total_variation(images) + self.l2 * images.flatten(1).norm(dim=1).mean()
                if student is not None:
                    loss = loss + self.competition * disagreement(answers, student(images))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    pixels.clamp_(0, 1)
        return to_bytes(pixels)


def share(whole: int, number: int, parts: int) -> int:
    """Size of part `number` if `whole` things are divided into `parts`."""
    return whole * (number + 1) // parts - whole * number // parts
