"""The one training loop. What is trained for what is the objective's business, not the loop's."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from undistill.core.files import MIB, write_lines
from undistill.core.progress import Progress
from undistill.core.seeds import derive, seeded
from undistill.core.tensors import read_tensors, write_tensors
from undistill.data.batches import ViewDataset
from undistill.data.sheet import COLUMNS, write_sheet
from undistill.data.split import Samples, Split
from undistill.data.views import Views
from undistill.training.answers import AnswerStore, RememberedAnswers
from undistill.training.loop import Loop, Stateful
from undistill.training.objectives import Objective
from undistill.training.optimisers import Extra
from undistill.training.recipe import Recipe


class Suspended(BaseException):
    """A training that waits to be done together with others; run again, it goes on from its checkpoint.

    It is no `Exception`, which an attack might catch.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__("This training is done by somebody else.")
        self.loop = loop


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
    """Name shown by the progress display."""
    view_seed: int | None = None
    """Seed of the views, `seed` by default. Trainings that share it share remembered answers."""
    store: AnswerStore = field(default_factory=AnswerStore)
    """Store for the answers of frozen networks."""
    trials: Path | None = None
    """Folder in which trials of compute settings are recorded, `folder` by default."""
    sheet: Path | None = None
    """Path of the picture that an attack draws of the images it made."""
    carried: Sequence[Stateful] = ()
    """Saved and restored with every checkpoint of every call, such as an oracle's ledger."""
    watch: Callable[[nn.Module], None] | None = None
    """An auditor's probe, called with the network in eval mode each time it was measured now."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every epoch, or of one in several where training images are few: the terms without their weights, the
    loss, validation accuracy and NLL, seconds."""
    computed: list[str] = field(default_factory=list)
    """Compute settings of each call."""
    asides: list[float] = field(default_factory=list)
    """Wall time of `once()` calls, and of trainings beside the run's own, in seconds."""
    found: dict[str, float] = field(default_factory=dict)
    """Numbers that a defence found by itself, such as the weight of a term; for the run's record."""
    calls: int = 0
    suspends: bool = False
    """Raise `Suspended` with the loop of a training that has not ended yet, instead of going on with it."""

    def answers(self, network: nn.Module) -> RememberedAnswers:
        """`network`, frozen: it answers each view of this training once, unless its answers vary."""
        return RememberedAnswers(network.to(self.device), self.recipe.compute, self.store, repeatable=None)

    def once(self, name: str, make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """Run `make` under its own seed; a resumed run finds its result, a tensor of `shape`, in the run folder."""
        file = self.folder / f"{name}.pt" if self.folder else None
        largest = 8 * math.prod(shape) + MIB
        held = read_tensors(file, self.device, largest) if file else None
        if held is None or not _is_made(held, shape):
            began = time.perf_counter()
            with seeded(derive(self.seed, name)):
                made = make()
            held = {"made": made, "seconds": time.perf_counter() - began}
            if file:
                write_tensors(file, held, largest)
        self.asides.append(held["seconds"])
        return cast(Tensor, held["made"])

    def views(self, samples: Samples, views: Views, role: str, num_classes: int = 1) -> ViewDataset:
        """A second kind of view of the same samples, such as strongly changed ones, drawn apart for each `role`.

        `batch.seen_as(dataset)` gives those of a batch. Whoever asks a network for them says how many classes it has.
        """
        seed = self.seed if self.view_seed is None else self.view_seed
        return ViewDataset(samples.unlabelled.to(self.device), views, derive(seed, role), num_classes)

    def show(self, images: Tensor) -> None:
        """Leave a sheet of the first of (N, C, H, W) uint8 images that an attack made, if it made any."""
        if self.sheet and len(images):
            write_sheet(self.sheet, images[: COLUMNS * COLUMNS], COLUMNS)

    @property
    def seconds(self) -> float:
        """Seconds spent in all epochs and `once()` calls, those before an interruption included."""
        return sum(epoch["seconds"] for epoch in self.history) + sum(self.asides)

    def __call__(
        self,
        network: nn.Module,
        data: Split,
        objective: Objective,
        *,
        extra: Sequence[Extra] = (),
        beside: Sequence[nn.Module] = (),
        carried: Sequence[Stateful] = (),
        epochs: int | None = None,
        choose: bool = True,
        aside: bool = False,
        bounds: Mapping[str, float] | None = None,
        capturable: bool = False,
    ) -> nn.Module:
        """Train `network` in place on `data`, and return it with the chosen weights, in eval mode.

        Args:
            network: what is trained, called by the objective as (B, C, H, W) in [0, 1] to logits (B, K).
            data: training images, and validation images on which every epoch is measured. Where those are more, so
                that measuring would take longest, it is done every few epochs, and still 100 times.
            objective: gives the terms of the loss of one batch; it must not wait for a GPU.
            extra: modules that are trained beside the network, in training mode meanwhile.
            beside: frozen networks that the objective calls; they get the layout in memory of the trained one.
            carried: saved and restored with every checkpoint, beside what all calls carry.
            epochs: instead of the recipe's; 0 leaves the network as it is.
            choose: False keeps the last epoch whatever the recipe says, for whoever has no validation images.
            aside: True for a network that is not the run's own: its time counts, and its epochs are not in the record.
            bounds: terms that by theory cannot exceed a value; one beyond it is made of rounding errors.
            capturable: True for an objective whose steps can be recorded on a GPU: what it keeps from one step of an
                epoch to the next, if anything, lies in tensors that it changes in place, and it asks no host.

        Raises `NonFinite`, naming epoch and term, as soon as a term, a weight or an answer is not finite.
        """
        epochs = self.recipe.epochs if epochs is None else epochs
        if epochs == 0:
            return network.to(self.device).eval()
        loop = Loop(
            fit=self,
            network=network,
            data=data,
            objective=objective,
            extra=extra,
            beside=beside,
            carried=[*self.carried, *carried],
            epochs=epochs,
            chooses=choose and data.is_labelled and self.recipe.selection == "best",
            bounds=bounds or {},
            checkpoint=self.folder / f"checkpoint-{self.calls}.pt" if self.folder else None,
            capturable=capturable,
        )
        self.calls += 1
        loop.restore()
        if self.suspends and loop.epoch < loop.epochs:
            raise Suspended(loop)
        try:
            self._train(loop)
        finally:
            self.computed.append(loop.manner)
            loop.steps.close()
        if aside:
            self.asides.append(sum(epoch["seconds"] for epoch in loop.history))
        else:
            self.history += loop.history
            self._write_history()
        return loop.result()

    def _train(self, loop: Loop) -> None:
        with self.progress.task(self.name, loop.epochs, done=loop.epoch) as task:
            while loop.epoch < loop.epochs:
                metrics = loop.one_round()
                if self.watch:
                    self.watch(loop.current.eval())
                if loop.is_due:
                    loop.save()
                note = f"loss {metrics['loss']:.3f} · validation {metrics['validation_accuracy']:.1%}"
                task.reach(loop.epoch, note)

    def choose(self, history: Sequence[dict[str, float]]) -> None:
        """Record of several trainings `history` alone, that of the one whose network is the result."""
        self.asides.append(self.seconds - sum(self.asides) - sum(epoch["seconds"] for epoch in history))
        self.history = list(history)
        self._write_history()

    def _write_history(self) -> None:
        if self.folder:
            write_lines(self.folder / "metrics.jsonl", self.history)


def _is_made(held: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether a file of `Fit.once` holds what it should."""
    made, seconds = held.get("made"), held.get("seconds")
    return isinstance(made, Tensor) and made.shape == shape and isinstance(seconds, float) and 0 <= seconds < math.inf
