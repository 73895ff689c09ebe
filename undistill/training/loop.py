"""The state of one training, whole at the end of every epoch, and its steps."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from undistill.core import distributed
from undistill.core.errors import LaunchError, NonFinite, SpecError, short_of_memory
from undistill.core.seeds import epoch_seed, seeded
from undistill.core.tensors import LARGEST, read_tensors, same_form, write_tensors
from undistill.data.batches import Batch, ViewDataset
from undistill.data.split import Split
from undistill.data.views import to_float
from undistill.training.autotune import autotune
from undistill.training.captured import Steps
from undistill.training.metrics import accuracy, evaluate, nll
from undistill.training.objectives import Objective, Weighted
from undistill.training.optimisers import Average, Extra, build_trained, tensors_of

if TYPE_CHECKING:
    from undistill.training.fit import Fit

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 2.0
MEMBERS = "members"  # in the metrics of an epoch: how many networks were trained in the same steps
CAPTURED = "captured"  # in the metrics of an epoch on a GPU: 1 if its steps were recorded as a graph, else 0
LEAST_ROUNDS = 100  # of training and measuring, unless there are fewer epochs


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loop:
    """The loop behind one call of `Fit`, which see."""

    def __init__(
        self,
        *,
        fit: "Fit",
        network: nn.Module,
        data: Split,
        objective: Objective,
        extra: Sequence[Extra],
        beside: Sequence[nn.Module],
        carried: Sequence[Stateful],
        epochs: int,
        chooses: bool,
        bounds: Mapping[str, float],
        checkpoint: Path | None,
        capturable: bool,
    ) -> None:
        self.fit, self.recipe, self.epochs, self.objective, self.bounds = fit, fit.recipe, epochs, objective, bounds
        self.carried, self.chooses, self.checkpoint = carried, chooses, checkpoint
        self.capturable = capturable
        self.network = network.to(fit.device)
        self.extra = [one.module.to(fit.device) for one in extra]
        self.train, self.validation = data.train.to(fit.device), data.validation.to(fit.device)
        seed = fit.seed if fit.view_seed is None else fit.view_seed
        self.dataset = ViewDataset(self.train, self.recipe.views, seed, data.num_classes)
        self.batches = self._count_batches()
        self.compute = autotune(
            self.recipe.compute,
            self.network,
            self._sample,
            steps=epochs * self.batches,
            training=True,
            folder=fit.trials or fit.folder,
            beside=beside,
        )
        for each in (self.network, *beside):
            self.compute.lay_out(each)
        if extra and distributed.world() > 1:
            raise LaunchError(
                "What is trained beside the network is trained in one process; start it without torchrun."
            )
        self.trained = build_trained(self.network, extra, self.recipe, epochs * self.batches)
        self.called = self.compute.compiled(distributed.parallel(self.network, self._sample))
        self.average = Average(self.network, self.recipe.ema) if self.recipe.ema else None
        self.best: dict[str, Tensor] | None = None
        # measuring on many images is not to take longer than learning from few
        self.per_round = min(math.ceil(len(self.validation) / len(self.train)), max(epochs // LEAST_ROUNDS, 1))
        optimisers = [trained.optimiser for trained in self.trained]
        self.steps = Steps(self.step, optimisers, fit.device, self.why_eager)
        self._scale = 1.0
        """By what a loss is multiplied, so that the sum over processes is right."""
        self.names: list[str] = []
        """Names of the terms, as of the latest step."""
        self._saved = time.monotonic()
        self.epoch = 0
        self.history: list[dict[str, float]] = []

    def _count_batches(self) -> int:
        # at least two images in each, or batch norm has nothing to learn from
        count = len(self.train)
        batches = max(min(math.ceil(count / self.recipe.batch_size), count // 2), 1)
        if count // batches < distributed.world():
            raise SpecError(
                f"{distributed.world()} processes cannot share batches of {count // batches} images; "
                "raise recipe.batch_size, or start fewer."
            )
        return batches

    def _sample(self) -> Tensor:
        """This process's share of a batch (B, C, H, W) in [0, 1]."""
        first = distributed.shard(torch.arange(len(self.train), device=self.train.labels.device)[: self.size])
        return to_float(self.dataset.show(0, first)[0].to(self.fit.device))

    @property
    def size(self) -> int:
        """Images in the largest batch."""
        return math.ceil(len(self.train) / self.batches)

    @property
    def manner(self) -> str:
        """How the steps were computed, for the record: the settings, and with how many other networks together."""
        most = round(max((past.get(MEMBERS, 0) for past in self.history), default=0))
        stacked = f" in a stack of {most}" if most else ""
        if self.fit.device.type != "cuda":
            return f"{self.compute}{stacked}"
        captured = any(past.get(CAPTURED) for past in self.history)
        why = f": {self.steps.why}" if self.steps.why else ""
        return f"{self.compute}{stacked}, " + ("captured" if captured else f"eager{why}")

    @property
    def current(self) -> nn.Module:
        return self.average.module if self.average else self.network

    def one_round(self) -> dict[str, float]:
        """Train for an epoch, or for several where training images are fewer than validation images, and measure."""
        began = time.perf_counter()
        for epoch in self.begin_round():
            self.epoch = epoch
            with seeded(epoch_seed(self.fit.seed, epoch)), self.compute.backend():
                metrics = self._train_epoch()
        return self.end_round(metrics, time.perf_counter() - began)

    def begin_round(self) -> range:
        """Turn to training; the epochs of this round."""
        for module in (self.called, *self.extra):
            module.train()
        return range(self.epoch, min(self.epoch + self.per_round, self.epochs))

    def end_round(self, metrics: dict[str, float], seconds: float) -> dict[str, float]:
        """Measure the network after a round whose training took `seconds`; all metrics of the round."""
        began = time.perf_counter()
        for module in (self.network, *self.extra):
            self._require_finite(module.state_dict(), "the weights after it")
        logits = self._validate()
        labels = self.validation.labels.to(logits.device)
        self.epoch += 1
        if self.fit.device.type == "cuda":
            metrics[CAPTURED] = float(self.steps.is_recorded)
        metrics |= {
            "epoch": self.epoch,
            "lr": float(self.trained[0].schedule.get_last_lr()[0]),
            "validation_accuracy": accuracy(logits, labels),
            "validation_nll": nll(logits, labels),
            "seconds": seconds + time.perf_counter() - began,
        }
        if self.chooses and metrics["validation_accuracy"] > max(
            (past["validation_accuracy"] for past in self.history), default=-1.0
        ):
            self.best = deepcopy(self.current.state_dict())
        self.history.append(metrics)
        return metrics

    def _train_epoch(self) -> dict[str, float]:
        """One pass over the training images."""
        whole = self.order()
        parts = [distributed.shard(index) for index in whole]
        if distributed.world() > 1:  # else all processes would drop out the same units
            torch.manual_seed(torch.initial_seed() ^ distributed.rank())
        rows, left = [], Counter(map(len, parts))
        self.steps.new_epoch()
        for index, size, shown in zip(parts, map(len, whole), self.dataset.shows(self.epoch, parts), strict=True):
            self._scale = distributed.loss_scale(len(index), size)
            left[len(index)] -= 1
            views, labels = (part.to(self.fit.device, non_blocking=True) for part in shown)
            rows.append(self.steps(views, labels, index, left=left[len(index)]))
        return self.metrics_of(torch.stack(rows))

    @property
    def why_eager(self) -> str:
        """Why no step can be recorded; empty where one may be."""
        reasons = {
            "not on a GPU": self.fit.device.type != "cuda",
            "in several processes": distributed.world() > 1,
            "its objective is not said to be capturable": not self.capturable,
        }
        return next((why for why, holds in reasons.items() if holds), "")

    def order(self) -> tuple[Tensor, ...]:
        """Indices of the images of each batch, drawn from torch's generator."""
        return torch.randperm(len(self.train)).to(self.train.labels.device).tensor_split(self.batches)

    def metrics_of(self, rows: Tensor) -> dict[str, float]:
        """The mean of each term over an epoch, from what every step added to it: `rows` (steps, terms).

        They are read from the device here, once. `NonFinite` where one is not finite, or a mean is above its bound.
        """
        steps = distributed.all_reduce(rows).cpu().double()
        broken = (~steps.isfinite()).any(1)
        self._require_finite(dict(zip(self.names, steps[broken.int().argmax()], strict=True)), "the term")
        metrics = dict(zip(self.names, steps.sum(0).tolist(), strict=True))
        for name, bound in self.bounds.items():
            if metrics[name] > bound:
                raise NonFinite(
                    f"Training stopped in epoch {self.epoch + 1} of {self.epochs}: the term '{name}' is "
                    f"{metrics[name]:.3g} and cannot exceed {bound:.3g}, so it is made of rounding errors. Lower its T."
                )
        return metrics

    def _validate(self) -> Tensor:
        """Logits (N, K) of the validation images."""
        try:
            return evaluate(self.current, self.validation, self.compute)
        except NonFinite as error:
            raise self._stopped(f"on validation images: {error}") from None

    def step(self, views: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """One step on uint8 views (B, C, H, W); what it adds to the means of the terms over the epoch."""
        images = self.compute.laid_out(to_float(views))
        loss, row = self.loss(self.called, Batch.of(self.dataset, self.epoch, index, images, labels))
        self.zero_grad()
        (loss * self._scale).backward()
        self.update()
        return row

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what its terms and itself add to their means over the epoch, (terms,)."""
        with self.compute.autocast(self.fit.device):
            terms = self.objective(network, batch)
        values = {name: term.value if isinstance(term, Weighted) else term for name, term in terms.items()}
        weights = [term.weight if isinstance(term, Weighted) else 1.0 for term in terms.values()]
        weighted = [value.float() * weight for value, weight in zip(values.values(), weights, strict=True)]
        loss = torch.stack(weighted).sum()
        self.names = [*values, "loss"]
        row = torch.stack([value.detach().float() for value in (*values.values(), loss)])
        return loss, row * (len(batch.images) / len(self.train))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for trained in self.trained:
            trained.optimiser.zero_grad()

    def update(self) -> None:
        """One step of every optimiser, along the gradients that are there."""
        for trained in self.trained:
            trained.clip(self.recipe.clip)
            trained.step()
        if self.average:
            self.average.update(self.network)

    def _require_finite(self, values: Mapping[str, Tensor], what: str) -> None:
        for name, value in values.items():
            if not value.isfinite().all():
                raise self._stopped(f"{what} '{name}' is NaN or infinite")

    def _stopped(self, why: str) -> NonFinite:
        return NonFinite(
            f"Training stopped in epoch {self.epoch + 1} of {self.epochs}: {why.rstrip('.')}. "
            f"Lower recipe.lr (now {self.recipe.lr:g}), clip the gradient (recipe.clip, now "
            f"{self.recipe.clip:g}, 0 is off), or lower the weight of that term. "
            "No weights were kept."
        )

    def result(self) -> nn.Module:
        for module in self.extra:
            module.eval()
        if self.best is not None:
            self.network.load_state_dict(self.best)
        elif self.average:
            self.network.load_state_dict(self.average.module.state_dict())
        return self.network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload,no-any-return]

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "extra": [module.state_dict() for module in self.extra],
            "trained": [trained.state_dict() for trained in self.trained],
            "average": self.average.state_dict() if self.average else None,
            "best": self.best,
            "epoch": self.epoch,
            "history": self.history,
            "carried": [thing.state_dict() for thing in self.carried],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises errors of many kinds for the state of another training, and leaves this one half changed."""
        self.network.load_state_dict(state["network"])
        for module, saved in zip(self.extra, state["extra"], strict=True):
            module.load_state_dict(saved)
        for trained, saved in zip(self.trained, state["trained"], strict=True):
            trained.load_state_dict(saved)
        if self.average:
            self.average.load_state_dict(state["average"])
        self.best, self.epoch, self.history = state["best"], state["epoch"], list(state["history"])
        for thing, saved in zip(self.carried, state["carried"], strict=True):
            thing.load_state_dict(saved)

    @property
    def _largest(self) -> int:
        """Bytes of a checkpoint: networks, optimisers, averages, best weights, and what an attack carries."""
        return (
            16 * sum(tensor.nbytes for module in (self.network, *self.extra) for tensor in tensors_of(module)) + LARGEST
        )

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is: after the last epoch, and where the latest is some seconds old."""
        return self.epoch == self.epochs or time.monotonic() - self._saved >= CHECKPOINT_SECONDS

    def save(self) -> None:
        """Write the checkpoint, if there is a place for it."""
        if self.checkpoint:
            write_tensors(self.checkpoint, self.state_dict(), self._largest)
            self._saved = time.monotonic()

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one that this training wrote; else begin."""
        path = self.checkpoint
        state = read_tensors(path, self.fit.device, self._largest) if path else None
        if not distributed.all_true(state is not None) or state is None:
            return
        before, why = deepcopy(self.state_dict()), ""
        try:
            self._require_ours(state)
            self.load_state_dict(state)
        except Exception as error:  # what is of another version, or made up, can fail in any way
            if short_of_memory(error):
                raise
            why = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        if not distributed.all_true(not why):
            self.load_state_dict(before)
            log.warning("%s is not of this training (%s); it begins again.", path, why or "in another process")

    def _require_ours(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError`, or fail, unless `state` has the form that `state_dict` has after an epoch."""
        own, epoch = self.state_dict(), state["epoch"]
        if type(epoch) is not int or epoch not in range(1, self.epochs + 1):
            raise ValueError(f"its epoch is {epoch!r:.40}")
        steps = epoch * self.batches
        trained = zip(self.trained, state["trained"], strict=True)
        alike = {
            "network": same_form(state["network"], own["network"]),
            "extra": same_form(state["extra"], own["extra"]),
            "optimiser": all(ours.could_be(theirs, steps) for ours, theirs in trained),
            "average": same_form(state["average"], own["average"]),
            "best": state["best"] is None or same_form(state["best"], own["network"]),
            "history": [past["epoch"] for past in state["history"]] == self._measured(epoch)
            and all(map(_is_measured, state["history"])),
        }
        for name, right in alike.items():
            if not right:
                raise ValueError(f"its {name} has another form")

    def _measured(self, epoch: int) -> list[int]:
        """The epochs at the end of which the network was measured, up to `epoch`, which is one of them."""
        return sorted({*range(self.per_round, epoch, self.per_round), epoch})


def _is_measured(epoch: Mapping[str, Any]) -> bool:
    """Whether an epoch's metrics are finite numbers, and those that others read are there."""
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in epoch.values())
    known = {"loss", "validation_accuracy", "validation_nll"} <= epoch.keys()
    return numbers and known and epoch["seconds"] >= 0 and 0 <= epoch["validation_accuracy"] <= 1
