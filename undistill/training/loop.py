"""The state of one training, whole at the end of every epoch, and its steps."""

import logging
import math
import time
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
from undistill.training.metrics import accuracy, evaluate, nll
from undistill.training.objectives import Objective, Weighted
from undistill.training.optimisers import Average, Extra, build_trained, tensors_of

if TYPE_CHECKING:
    from undistill.training.fit import Fit

log = logging.getLogger(__name__)

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
    ) -> None:
        self.fit, self.recipe, self.epochs, self.objective, self.bounds = fit, fit.recipe, epochs, objective, bounds
        self.carried, self.chooses = carried, chooses
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
    def current(self) -> nn.Module:
        return self.average.module if self.average else self.network

    def one_round(self) -> dict[str, float]:
        """Train for an epoch, or for several where training images are fewer than validation images, and measure."""
        began = time.perf_counter()
        for module in (self.called, *self.extra):
            module.train()
        first, last = self.epoch, min(self.epoch + self.per_round, self.epochs) - 1
        for self.epoch in range(first, last + 1):
            with seeded(epoch_seed(self.fit.seed, self.epoch)), self.compute.backend():
                metrics = self._train_epoch()
        for module in (self.network, *self.extra):
            self._require_finite(module.state_dict(), "the weights after it")
        logits = self._validate()
        labels = self.validation.labels.to(logits.device)
        self.epoch += 1
        metrics |= {
            "epoch": self.epoch,
            "lr": float(self.trained[0].schedule.get_last_lr()[0]),
            "validation_accuracy": accuracy(logits, labels),
            "validation_nll": nll(logits, labels),
            "seconds": time.perf_counter() - began,
        }
        if self.chooses and metrics["validation_accuracy"] > max(
            (past["validation_accuracy"] for past in self.history), default=-1.0
        ):
            self.best = deepcopy(self.current.state_dict())
        self.history.append(metrics)
        return metrics

    def _train_epoch(self) -> dict[str, float]:
        """One pass over the training images; its terms are gathered on the device and read at the end."""
        order = torch.randperm(len(self.train)).to(self.train.labels.device)
        whole = order.tensor_split(self.batches)
        parts = [distributed.shard(index) for index in whole]
        if distributed.world() > 1:  # else all processes would drop out the same units
            torch.manual_seed(torch.initial_seed() ^ distributed.rank())
        rows = []
        for index, size, (views, labels) in zip(
            parts, map(len, whole), self.dataset.shows(self.epoch, parts), strict=True
        ):
            images = self.compute.laid_out(to_float(views.to(self.fit.device, non_blocking=True)))
            labels = labels.to(self.fit.device, non_blocking=True)
            batch = Batch.of(self.dataset, self.epoch, index, images, labels)
            terms = self._step(batch, distributed.loss_scale(len(index), size))
            rows.append(torch.stack(list(terms.values())) * (len(index) / len(self.train)))
        steps = distributed.all_reduce(torch.stack(rows)).cpu().double()
        broken = (~steps.isfinite()).any(1)
        self._require_finite(dict(zip(terms, steps[broken.int().argmax()], strict=True)), "the term")
        metrics = dict(zip(terms, steps.sum(0).tolist(), strict=True))
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

    def _step(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """Every term and their sum, detached."""
        if self.compute.compile and self.fit.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with self.compute.autocast(self.fit.device):
            terms = self.objective(self.called, batch)
        values = {name: term.value if isinstance(term, Weighted) else term for name, term in terms.items()}
        weights = [term.weight if isinstance(term, Weighted) else 1.0 for term in terms.values()]
        weighted = [value.float() * weight for value, weight in zip(values.values(), weights, strict=True)]
        loss = torch.stack(weighted).sum()
        for trained in self.trained:
            trained.optimiser.zero_grad()
        (loss * scale).backward()
        for trained in self.trained:
            trained.clip(self.recipe.clip)
            trained.step()
        if self.average:
            self.average.update(self.network)
        return {name: value.detach().float() for name, value in (values | {"loss": loss}).items()}

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

    def save(self, path: Path) -> None:
        write_tensors(path, self.state_dict(), self._largest)

    def restore(self, path: Path | None) -> None:
        """Go on from a checkpoint, if there is one that this training wrote; else begin."""
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
