"""The one training loop. What is trained for what is the objective's business, not the loop's."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from undistill import distributed
from undistill.answers import Answers, AnswerStore
from undistill.data import Split
from undistill.engine import Engine, settle
from undistill.errors import ModelError, NonFinite, SpecError, StoreError
from undistill.files import write_lines
from undistill.measure import accuracy, evaluate, nll
from undistill.models import seeded
from undistill.progress import Progress
from undistill.seeds import derive
from undistill.sheet import COLUMNS, write_sheet
from undistill.spec import Spec
from undistill.states import read_tensors, write_tensors
from undistill.stream import Batch, Stream
from undistill.views import Views, to_float

CHECKPOINT_SECONDS = 2.0


class Recipe(Spec):
    """How the loop runs; the defaults suit small images."""

    epochs: int = Field(40, ge=0)
    batch_size: int = Field(64, ge=2)
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD, first beta of AdamW."""
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["step", "cosine", "one_cycle"] = "one_cycle"
    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of the epochs in which the learning rate rises to `lr`."""
    drops: tuple[float, ...] = (0.5, 0.75)
    """For schedule 'step': shares of the epochs at which the learning rate falls by `gamma`."""
    gamma: float = Field(0.1, gt=0, lt=1)
    clip: float = Field(5.0, ge=0)
    """Largest norm of the whole gradient; 0 leaves it alone."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the averaged weights that become the result; 0 takes the last weights."""
    selection: Literal["last", "best"] = "last"
    """The epoch whose weights are kept; 'best' goes by validation accuracy."""
    engine: Engine = Engine()
    views: Views = Views()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.schedule == "one_cycle" and self.warmup == 0:
            raise ValueError("schedule 'one_cycle' rises before it falls: warmup must be above 0")
        if any(not 0 < drop < 1 for drop in self.drops):
            raise ValueError("drops are shares of the epochs, between 0 and 1")
        return self


Objective = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
"""Named terms; the loss is their sum."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Fit:
    """`fit(network, data, objective)`: train in place, return the selected weights in eval mode.

    With a `folder`, a run that was stopped goes on from its last checkpoint and ends with the same
    bits: every epoch reseeds its order, its views and torch's generators from (seed, epoch) alone.
    The n-th call of one run uses the n-th checkpoint file.
    """

    recipe: Recipe
    seed: int
    device: torch.device
    folder: Path | None = None
    progress: Progress = field(default_factory=Progress.silent)
    name: str = "training"
    """What progress calls it."""
    view_seed: int | None = None
    """Which views are shown, `seed` by default; trainings that share it share remembered answers."""
    store: AnswerStore = field(default_factory=AnswerStore)
    """Where the answers of frozen networks are kept."""
    trials: Path | None = None
    """Where measured engines are recorded, `folder` by default."""
    sheet: Path | None = None
    """Where an attack leaves a picture of the images that it made."""
    carried: Sequence[Stateful] = ()
    """Saved and restored with every checkpoint, such as an oracle's count."""
    beside: Sequence[nn.Module] = ()
    """Networks that the objective calls beside the trained one; they get its layout in memory."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Every epoch's metrics: the terms, their sum, validation accuracy and NLL, seconds."""
    engines: list[str] = field(default_factory=list)
    """How the network of each call was computed."""
    asides: list[float] = field(default_factory=list)
    """Seconds of what was made `once`, between epochs."""
    calls: int = 0

    def answers(self, network: nn.Module) -> Answers:
        """`network`, frozen: it answers each view of this training once."""
        return Answers(network.to(self.device), self.recipe.engine, self.store)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes with a seed of its own; a stopped run finds it again in its folder."""
        file = self.folder / f"{name}.pt" if self.folder else None
        held = read_tensors(file, self.device) if file else None
        if held is None:
            began = time.perf_counter()
            with seeded(derive(self.seed, name)):
                made = make()
            held = {"made": made, "seconds": time.perf_counter() - began}
            if file:
                write_tensors(file, held)
        self.asides.append(held["seconds"])
        return cast(Tensor, held["made"])

    def show(self, images: Tensor) -> None:
        """Leave a sheet of the first of (N, C, H, W) uint8 images that an attack made, if it made any."""
        if self.sheet and len(images):
            write_sheet(self.sheet, images[: COLUMNS * COLUMNS], COLUMNS)

    @property
    def seconds(self) -> float:
        """Time spent so far in all epochs and what was made between them, before an interruption included."""
        return sum(epoch["seconds"] for epoch in self.history) + sum(self.asides)

    def __call__(
        self, network: nn.Module, data: Split, objective: Objective, *, epochs: int | None = None
    ) -> nn.Module:
        """Raises `NonFinite`, naming epoch and term, as soon as a term or a weight is not finite."""
        epochs = self.recipe.epochs if epochs is None else epochs
        if epochs == 0:
            return network.to(self.device).eval()
        loop = _Loop(self, network, data, objective, epochs)
        checkpoint = self.folder / f"checkpoint-{self.calls}.pt" if self.folder else None
        self.calls += 1
        self.engines.append(str(loop.engine))
        loop.restore(checkpoint)
        saved = time.monotonic()
        with self.progress.task(self.name, loop.epochs, done=loop.epoch) as task:
            while loop.epoch < loop.epochs:
                metrics = loop.one_epoch()
                last = loop.epoch == loop.epochs
                if checkpoint and (last or time.monotonic() - saved >= CHECKPOINT_SECONDS):
                    loop.save(checkpoint)
                    saved = time.monotonic()
                task.advance(f"loss {metrics['loss']:.3f} · validation {metrics['validation_accuracy']:.1%}")
        self.history += loop.history
        if self.folder:
            write_lines(self.folder / "metrics.jsonl", self.history)
        return loop.result()


class _Loop:
    """The state of one call of `Fit`, whole at the end of every epoch."""

    def __init__(self, fit: Fit, network: nn.Module, data: Split, objective: Objective, epochs: int) -> None:
        self.fit, self.recipe, self.epochs, self.objective = fit, fit.recipe, epochs, objective
        self.network = network.to(fit.device)
        self.train, self.validation = data.train.to(fit.device), data.validation.to(fit.device)
        seed = fit.seed if fit.view_seed is None else fit.view_seed
        self.stream = Stream(self.train, self.recipe.views, seed, data.num_classes)
        self.batches = self._count_batches()
        self.engine = settle(
            self.recipe.engine,
            self.network,
            self._sample,
            steps=epochs * self.batches,
            training=True,
            folder=fit.trials or fit.folder,
        )
        for each in (self.network, *fit.beside):
            self.engine.lay_out(each)
        self.optimiser = build_optimiser(self.network, self.recipe)
        self.called = self.engine.compiled(distributed.parallel(self.network, self._sample))
        self.schedule = build_schedule(self.optimiser, self.recipe, epochs * self.batches)
        self.average = Average(self.network, self.recipe.ema) if self.recipe.ema else None
        self.best: dict[str, Tensor] | None = None
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
        first = distributed.mine(torch.arange(len(self.train), device=self.train.labels.device)[: self.size])
        return to_float(self.stream.show(0, first)[0].to(self.fit.device))

    @property
    def size(self) -> int:
        """Images in the largest batch."""
        return math.ceil(len(self.train) / self.batches)

    @property
    def current(self) -> nn.Module:
        return self.average.module if self.average else self.network

    def one_epoch(self) -> dict[str, float]:
        began = time.perf_counter()
        self.called.train()
        with seeded(epoch_seed(self.fit.seed, self.epoch)), self.engine.backend():
            metrics = self._train_epoch()
        self._check_finite(self.network.state_dict(), "the weights after it")
        logits = evaluate(self.current, self.validation, self.engine)
        labels = self.validation.labels.to(logits.device)
        self.epoch += 1
        metrics |= {
            "epoch": self.epoch,
            "lr": float(self.schedule.get_last_lr()[0]),
            "validation_accuracy": accuracy(logits, labels),
            "validation_nll": nll(logits, labels),
            "seconds": time.perf_counter() - began,
        }
        if self.recipe.selection == "best" and metrics["validation_accuracy"] > max(
            (past["validation_accuracy"] for past in self.history), default=-1.0
        ):
            self.best = deepcopy(self.current.state_dict())
        self.history.append(metrics)
        return metrics

    def _train_epoch(self) -> dict[str, float]:
        """One pass over the training images; its terms are gathered on the device and read at the end."""
        order = torch.randperm(len(self.train)).to(self.train.labels.device)
        whole = order.tensor_split(self.batches)
        parts = [distributed.mine(index) for index in whole]
        if distributed.world() > 1:  # else all processes would drop out the same units
            torch.manual_seed(torch.initial_seed() ^ distributed.rank())
        rows = []
        for index, size, (views, labels) in zip(
            parts, map(len, whole), self.stream.shows(self.epoch, parts), strict=True
        ):
            images = self.engine.laid_out(to_float(views.to(self.fit.device, non_blocking=True)))
            labels = labels.to(self.fit.device, non_blocking=True)
            batch = Batch.of(self.stream, self.epoch, index, images, labels)
            terms = self._step(batch, distributed.scale(len(index), size))
            rows.append(torch.stack(list(terms.values())) * (len(index) / len(self.train)))
        steps = distributed.summed(torch.stack(rows)).cpu().double()
        broken = (~steps.isfinite()).any(1)
        self._check_finite(dict(zip(terms, steps[broken.int().argmax()], strict=True)), "the term")
        return dict(zip(terms, steps.sum(0).tolist(), strict=True))

    def _step(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """Every term and their sum, detached."""
        if self.engine.compile and self.fit.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with self.engine.autocast(self.fit.device):
            terms = dict(self.objective(self.called, batch))
        loss = torch.stack([value.float() for value in terms.values()]).sum()
        self.optimiser.zero_grad()
        (loss * scale).backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.optimiser.step()
        self.schedule.step()
        if self.average:
            self.average.update(self.network)
        return {name: value.detach().float() for name, value in (terms | {"loss": loss}).items()}

    def _check_finite(self, values: Mapping[str, Tensor], what: str) -> None:
        for name, value in values.items():
            if not value.isfinite().all():
                raise NonFinite(
                    f"Training stopped in epoch {self.epoch + 1} of {self.epochs}: {what} '{name}' is NaN or infinite. "
                    f"Lower recipe.lr (now {self.recipe.lr:g}), clip the gradient (recipe.clip, now "
                    f"{self.recipe.clip:g}, 0 is off), or lower the weight of that term. "
                    "No weights were kept."
                )

    def result(self) -> nn.Module:
        if self.best is not None:
            self.network.load_state_dict(self.best)
        elif self.average:
            self.network.load_state_dict(self.average.module.state_dict())
        return self.network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload,no-any-return]

    def save(self, path: Path) -> None:
        parts = {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "best": self.best,
            "epoch": self.epoch,
            "history": self.history,
            "carried": [thing.state_dict() for thing in self.fit.carried],
        }
        write_tensors(path, parts)

    def restore(self, path: Path | None) -> None:
        state = read_tensors(path, self.fit.device) if path else None
        if state is None:
            return
        try:
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.schedule.load_state_dict(state["schedule"])
            if self.average:
                self.average.load_state_dict(state["average"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise StoreError(
                f"{path} is of another network or version ({str(error).splitlines()[0]}); remove its folder."
            ) from None
        self.best, self.epoch, self.history = state["best"], state["epoch"], state["history"]
        for thing, saved in zip(self.fit.carried, state["carried"], strict=True):
            thing.load_state_dict(saved)


def epoch_seed(seed: int, epoch: int) -> int:
    """A generator seed for (seed, epoch), distinct for every pair below 2**32."""
    return seed << 32 | epoch


def build_optimiser(network: nn.Module, recipe: Recipe) -> Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise ModelError(
            "The network has no trainable parameter (requires_grad is False on all); nothing can be learnt."
        )
    fused = parameters[0].is_cuda
    if recipe.optimiser == "adamw":
        betas = (recipe.momentum, 0.999)
        return AdamW(parameters, recipe.lr, betas, weight_decay=recipe.weight_decay, fused=fused)
    return SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=fused)


def build_schedule(optimiser: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The learning rate of every step."""
    rise = round(recipe.warmup * steps)
    if recipe.schedule == "one_cycle":
        share = max(rise, 1) / steps
        return OneCycleLR(optimiser, recipe.lr, total_steps=steps + 1, pct_start=share, cycle_momentum=False)
    main: LRScheduler
    if recipe.schedule == "cosine":
        main = CosineAnnealingLR(optimiser, max(steps - rise, 1))
    else:
        main = MultiStepLR(optimiser, [max(round(drop * steps) - rise, 0) for drop in recipe.drops], recipe.gamma)
    if not rise:
        return main
    return SequentialLR(optimiser, [LinearLR(optimiser, 1 / rise, total_iters=rise), main], [rise])


class Average:
    """Exponentially averaged weights and buffers; unlike torch's own, no update waits for a GPU."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = deepcopy(network)
        self.decay = decay
        self.started = False

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        pairs = list(zip(_tensors(self.module), _tensors(network), strict=True))
        for own, new in pairs:
            if self.started and own.is_floating_point():
                own.lerp_(new, 1 - self.decay)
            else:
                own.copy_(new)
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "started": self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.started = state["started"]


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
