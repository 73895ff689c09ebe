"""Smoothed queries: what a victim answers to several copies of an image, in the mean."""

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Fresh, QueryAttack, Role, tries
from undistill.core.spec import Temperature
from undistill.core.unshown import LOG_ZERO
from undistill.data.batches import Batch, ViewDataset
from undistill.data.split import Split
from undistill.data.views import to_float
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation
from undistill.training.objectives import Terms, Weighted
from undistill.training.recipe import Recipe
from undistill.victims.answer import Answer
from undistill.victims.bought import Bought, by_sample
from undistill.victims.oracle import Oracle

PART = 512  # images that are asked together


class QuerySmoothing(QueryAttack):
    """The student imitates the mean of the answers to `k` other views of an image, each of which is a query.

    Noise, and what a defence does differently to neighbouring inputs, cancels out in the mean.
    """

    role = Role.ADAPTIVE
    space = tries(T=(1.0, 4.0), alpha=(0.5, 0.9))
    k: int = Field(3, ge=2, le=1000)
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)
    """Weight of imitation against the thief's own labels."""

    @property
    def asks_own_images(self) -> bool:
        return False  # but about other views of them

    def queries_per_image(self, recipe: Recipe) -> int:
        mixed = recipe.views.mixup or recipe.views.cutmix  # both images of a mixed view are asked
        return self.k * (1 if self.once else recipe.epochs * (2 if mixed else 1))

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        views = fit.recipe.views.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
        datasets = [fit.views(data.train, views, f"copy {number}", data.num_classes) for number in range(self.k)]
        copies = Copies(oracle, datasets, fit.device)
        ask = Bought(copies.of_all()) if self.once else copies

        def objective(student: nn.Module, batch: Batch) -> Terms:
            logits = student(batch.images)
            soft, ce = distillation(ask(batch).filled, logits, self.T), cross_entropy(logits, batch.labels)
            return {"soft": Weighted(soft, self.alpha), "ce": Weighted(ce, 1 - self.alpha)}

        return fit(fresh(), data, objective)


class Copies:
    """`copies(batch)`: the mean answer to several other views of each image of a batch."""

    def __init__(self, oracle: Oracle, datasets: Sequence[ViewDataset], device: torch.device) -> None:
        self.oracle, self.datasets, self.device = oracle, datasets, device

    def __call__(self, batch: Batch) -> Answer:
        return by_sample(batch, lambda index: self._mean(batch.epoch, index))

    def of_all(self) -> Answer:
        """The mean answers (N, K) to the first views of all images."""
        return Answer.joined([self._mean(0, index) for index in self.datasets[0].samples.parts(PART)])

    def _mean(self, epoch: int, index: Tensor) -> Answer:
        answers = [self.oracle(self._view(dataset, epoch, index)) for dataset in self.datasets]
        log_p = torch.stack([answer.filled for answer in answers]).logsumexp(0) - math.log(len(answers))
        return Answer(log_p.clamp_min(LOG_ZERO), torch.stack([answer.shown for answer in answers]).any(0))

    def _view(self, dataset: ViewDataset, epoch: int, index: Tensor) -> Batch:
        """The views of some samples as a batch, so that its answers are remembered."""
        images, labels = (part.to(self.device) for part in dataset.show(epoch, index))
        return Batch.of(dataset, epoch, index, to_float(images), labels)
