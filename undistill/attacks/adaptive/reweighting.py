"""A student that learns most from those answers that help it on labels of its own."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from undistill.attacks.attack import Fresh, QueryAttack, Role, tries
from undistill.core.seeds import derive
from undistill.core.spec import Temperature
from undistill.data.batches import Batch, ViewDataset
from undistill.data.split import Samples, Split
from undistill.data.views import to_float
from undistill.training.compute import EXACT
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms, Weighted
from undistill.victims.oracle import Oracle

LARGEST = 10.0  # gain that counts
STEP = 1e-3  # length of the trial step, in gradients


class Reweighting(QueryAttack):
    """Plain distillation in which each image weighs as much as imitating it helps on labels that are held out.

    A trial step goes down the gradient of the loss on held-out images. An image whose own loss falls by it pulls in
    the same direction and gains weight, exp(beta gain); one whose loss rises teaches something else, as a planted
    wrong answer does.
    """

    role = Role.ADAPTIVE
    space = tries(T=(1.0, 4.0), alpha=(0.5, 0.9), beta=(0.5, 1.0))
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)
    """Weight of imitation against the thief's own labels."""
    beta: float = Field(1.0, ge=0, le=100)
    held: float = Field(0.05, gt=0, le=0.5)
    """Share of the thief's images that only decide about weights."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        rest, held = hold_out(data.train, self.held, derive(fit.seed, "held"))
        data, held, network = replace(data, train=rest), held.to(fit.device), fresh()
        ask, views = self.asking(oracle, data), ViewDataset(held, fit.recipe.views, fit.seed, data.num_classes)

        def objective(student: nn.Module, batch: Batch) -> Terms:
            logits = student(batch.images)
            answers = ask(batch).filled
            drawn = torch.randint(len(held), (len(batch.images),), device=held.labels.device)
            images, labels = (part.to(logits.device) for part in views.show(batch.epoch, drawn))
            before, after = logits_around_step(network, to_float(images), labels, batch.images)
            gains = (soft_losses(answers, before, self.T) - soft_losses(answers, after, self.T)) / STEP
            soft, ce = soft_losses(answers, logits, self.T), cross_entropy(logits, batch.labels)
            weights = weights_of(gains, self.beta)
            return {"soft": Weighted((weights * soft).mean(), self.alpha), "ce": Weighted(ce, 1 - self.alpha)}

        return fit(network, data, objective)


def hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """(rest, held): a random `share` of the samples, at least one, held out where two others are left."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    count = max(round(share * len(samples)), 1)
    rest = order[count:] if len(samples) - count >= 2 else order
    return samples[rest.sort().values], samples[order[:count]]


def soft_losses(teacher: Tensor, student: Tensor, T: float) -> Tensor:
    """T^2 KL(teacher/T || student/T) of each image, (B,)."""
    log_p, log_q = (F.log_softmax(logits.float() / T, 1) for logits in (teacher, student))
    return T * T * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def weights_of(gains: Tensor, beta: float) -> Tensor:
    """Weights (B,) with mean 1, proportional to exp(beta gain); gains (B,) beyond 10 count as 10."""
    return torch.softmax(beta * gains.clamp(-LARGEST, LARGEST), 0) * len(gains)


def logits_around_step(network: nn.Module, held: Tensor, labels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) for `images` before and after a small step of the network that helps on `held` images.

    The step is undone. All is computed exactly, and twice with the same units dropped out: rounding to bf16, or other
    units, would change logits by more than the step does.
    """
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    buffers = {name: value.clone() for name, value in network.named_buffers()}  # batch norm counts images once
    device = images.device
    with EXACT.active(device):
        loss = cross_entropy(functional_call(network, parameters | buffers, (held,)), labels)
        downhill = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        slopes = zip(parameters.items(), downhill, strict=True)
        with torch.no_grad():
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                before: Tensor = functional_call(network, parameters | buffers, (images,))
            after: Tensor = functional_call(
                network, {name: value - STEP * slope for (name, value), slope in slopes} | buffers, (images,)
            )
    return before, after
