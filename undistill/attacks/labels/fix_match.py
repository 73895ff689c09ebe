"""FixMatch (Sohn et al., NeurIPS 2020) on bought labels: the true floor of a small budget."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from undistill.attacks.attack import Attack, Buying, Fresh, Role, ThiefData, tries
from undistill.core.spec import Weight
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.data.views import Views, to_float
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms, Weighted
from undistill.victims.oracle import Access, Oracle


class FixMatch(Attack):
    """Cross-entropy on the victim's top answers, and on the student's own sure answers to images that nobody labelled.

    The student guesses the class of an unlabelled image from a weakly changed view; where it is sure, it learns that
    class on a strongly changed view (eq. 4). All images of the thief are unlabelled ones, too, as is usual; an epoch
    passes over all of them.
    """

    needs = Access.QUERY
    data = ThiefData.UNLABELLED
    role = Role.SEMI_SUPERVISED
    buying = Buying.ONCE
    passes_over_spare = True
    space = tries(threshold=(0.7, 0.95), mu=(1, 3, 7))
    threshold: float = Field(0.95, ge=0, le=1)
    """Confidence above which a guess counts."""
    mu: int = Field(7, ge=1, le=100)
    """Unlabelled images in a step for each labelled one."""
    weight: Weight = 1.0

    @property
    def asks_own_images(self) -> bool:
        return True

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        pool, plain = data.everything, fit.recipe.views.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
        top = oracle.once(data.train, data.num_classes).top.to(fit.device)
        copies = torch.arange(len(pool)) % len(data.train)  # so that one image has many views in an epoch
        labelled = fit.views(data.train[copies], plain, "labelled")
        weak, strong = fit.views(pool, plain, "weak"), fit.views(pool, stronger(plain), "strong")

        def objective(student: nn.Module, batch: Batch) -> Terms:
            count = max(math.ceil(len(batch.images) / self.mu), 2)
            drawn = torch.randint(len(pool), (count,), device=batch.index.device)
            images = to_float(labelled.show(batch.epoch, drawn)[0].to(fit.device))
            ce = cross_entropy(student(images), top[drawn.to(fit.device) % len(top)])
            with without_statistics(student):
                with torch.no_grad():
                    sure, guess = student(batch.seen_as(weak)).float().softmax(1).max(1)
                losses = F.cross_entropy(student(batch.seen_as(strong)).float(), guess, reduction="none")
            return {"ce": ce, "guessed": Weighted((losses * (sure > self.threshold)).mean(), self.weight)}

        return fit(fresh(), replace(data, train=pool), objective)


def stronger(views: Views) -> Views:
    """Views that keep the class and little else: further shifted, turned, with a part cut out."""
    return views.model_copy(update={"crop": 0.25, "rotate": max(views.rotate, 20.0), "cutout": 0.5})


@contextmanager
def without_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise by the batch and leave their running statistics, which are of labelled images."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
