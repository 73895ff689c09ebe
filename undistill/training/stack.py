"""Students of one architecture, trained in the same steps.

An audit trains many small networks on the same views, and the work of a small network's step is mostly overhead. Here
their trainings go in lockstep, and each keeps what is its own: order of images, objective, clipping, optimiser,
schedule, checkpoint. On a CPU their weights are stacked, and one program runs over all (`Vmapped`); on a GPU their
steps are branches of one recorded graph, which run side by side (`Branched`). A network ends with the weights that it
has when it is trained alone, up to rounding.
"""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from undistill.core import distributed
from undistill.core.progress import Progress
from undistill.core.seeds import epoch_seed, seeded
from undistill.data.batches import Batch
from undistill.data.views import to_float
from undistill.training.captured import Steps, is_recording
from undistill.training.loop import MEMBERS, Loop

PART = 512  # views that are made together
STREAMS = 16  # branches of a graph that may run side by side
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""By how much the largest logit of a stacked network may differ from that of the network alone."""
TRIED, GAIN = 3, 0.9
"""Steps of a trial, and the largest share of the time alone that is a gain."""


class Unstackable(Exception):
    """Trainings that cannot go on together with others, and why."""

    def __init__(self, loops: Sequence[Loop], why: str) -> None:
        super().__init__(why)
        self.loops = loops


def why_alone(loop: Loop) -> str:
    """Why a training can only be done alone; empty where it can go in lockstep with others of its `kind`."""
    modules = list(loop.network.modules())
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    on_gpu = loop.fit.device.type == "cuda"
    reasons = {
        "It runs in several processes.": distributed.world() > 1,
        "Its images do not lie in memory.": not isinstance(loop.train.images, Tensor),
        "Its network is compiled.": loop.compute.compile and not on_gpu,
        "Its network has hooks.": any(getattr(module, name) for module in modules for name in kinds)
        or any(weight._backward_hooks for weight in loop.network.parameters()),
        f"Its steps are not recorded: {loop.why_eager}.": on_gpu and bool(loop.why_eager),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def kind(loop: Loop) -> str:
    """The same text for trainings that can go in lockstep: of networks alike, on the same views, at the same epoch."""
    weights = [(name, tuple(value.shape), value.dtype) for name, value in loop.network.state_dict().items()]
    trained = [parameter.requires_grad for parameter in loop.network.parameters()]
    plan = loop.compute, loop.epochs, loop.epoch, loop.per_round, loop.batches, loop.fit.device
    return repr((str(loop.network), weights, trained, loop.dataset.digest, len(loop.train), *map(str, plan)))


def stack_of(loops: Sequence[Loop]) -> "Stack":
    """The stack of some loops of one `kind`, in the way of their device."""
    return (Branched if loops[0].fit.device.type == "cuda" else Vmapped)(loops)


class Stack(ABC):
    """Loops of one `kind`, in lockstep. Each remains whole, and writes its own checkpoints."""

    def __init__(self, loops: Sequence[Loop]) -> None:
        self.loops, self.first = loops, loops[0]
        self.epoch = 0
        self.views = torch.empty(0)
        """uint8 views (N, C, H, W) of all images in this epoch."""
        self.checks = False
        """Whether the next step is to find out what cannot be stacked: the first of each epoch."""
        optimisers = [trained.optimiser for loop in loops for trained in loop.trained]
        why = next(filter(None, (loop.why_eager for loop in loops)), "")
        self.steps = Steps(self._step, optimisers, self.first.fit.device, why, passes=(Unstackable,))
        for loop in loops:
            loop.steps = self.steps

    def train(self, progress: Progress) -> None:
        """Train all of them to the end; `Unstackable` for those that must be trained alone."""
        first, name = self.first, f"{len(self.loops)} students"
        try:
            with progress.task(name, first.epochs, done=first.epoch, units=len(self.loops)) as task:
                while first.epoch < first.epochs:
                    self.one_round()
                    reached = [loop.history[-1]["validation_accuracy"] for loop in self.loops]
                    task.reach(first.epoch, f"validation {min(reached):.1%} to {max(reached):.1%}")
        finally:
            self.steps.close()

    def one_round(self) -> None:
        began = time.perf_counter()
        epochs, *_ = [loop.begin_round() for loop in self.loops]
        with self._sharing():
            for epoch in epochs:
                metrics = self._train_epoch(epoch)
        seconds = (time.perf_counter() - began) / len(self.loops)
        for loop, own in zip(self.loops, metrics, strict=True):
            with alone_if_it_fails([loop]):
                loop.end_round(own | {MEMBERS: float(len(self.loops))}, seconds)
        if any(loop.is_due for loop in self.loops):  # at the same epoch, so that they can go on together
            for loop in self.loops:
                loop.save()

    def _train_epoch(self, epoch: int) -> list[dict[str, float]]:
        """The metrics of each network over one epoch."""
        self.epoch, self.views = epoch, self._views_of(epoch)
        orders, rows = [], []
        for loop in self.loops:
            loop.epoch = epoch
            with seeded(epoch_seed(loop.fit.seed, epoch)):
                orders.append(loop.order())
        batches = [torch.stack(parts) for parts in zip(*orders, strict=True)]
        left = Counter(index.shape for index in batches)
        self.steps.new_epoch()
        self.checks = True
        with self.first.compute.backend():
            for index in batches:
                left[index.shape] -= 1
                rows.append(self.steps(index, left=left[index.shape]))
        metrics = []
        for loop, own in zip(
            self.loops, torch.stack(rows).split([len(loop.names) for loop in self.loops], 1), strict=True
        ):
            with alone_if_it_fails([loop]):
                metrics.append(loop.metrics_of(own))
        return metrics

    def _views_of(self, epoch: int) -> Tensor:
        dataset = self.first.dataset
        parts = [part.to(dataset.samples.labels.device) for part in dataset.samples.parts(PART)]
        return torch.cat([views for views, _ in dataset.shows(epoch, parts)])

    @abstractmethod
    def require_gain(self) -> None:
        """`Unstackable` where a short trial shows that these networks are as fast one after another."""

    def _sharing(self) -> AbstractContextManager[None]:
        """Holds what the networks share, during a round."""
        return nullcontext()

    def _step(self, index: Tensor) -> Tensor:
        """One step of every network, on its own batch of this epoch's views: those at its row of `index` (M, B)."""
        checks, self.checks = self.checks, False
        return torch.cat(self._step_all(index, checks))

    @abstractmethod
    def _step_all(self, index: Tensor, checks: bool) -> list[Tensor]:
        """One step of every network; the row (terms,) of each. `Unstackable`, with `checks`, for those that differ."""


class Branched(Stack):
    """Each network makes its own step; while they are recorded, on streams that the graph joins again."""

    def __init__(self, loops: Sequence[Loop]) -> None:
        super().__init__(loops)
        self._streams: dict[int, torch.cuda.Stream] = {}

    def require_gain(self) -> None:
        """Branches were faster for every network that was measured (docs/log/gpu.md)."""

    def _step_all(self, index: Tensor, checks: bool) -> list[Tensor]:
        rows = []
        for number, (loop, own) in enumerate(zip(self.loops, index, strict=True)):
            with self._branch(number), alone_if_it_fails([loop]), undrawn(loop):
                rows.append(loop.step(self.views[own], loop.dataset.labels(self.epoch, own), own))
        if is_recording():
            for stream in self._streams.values():
                torch.cuda.current_stream().wait_stream(stream)
        return rows

    @contextmanager
    def _branch(self, number: int) -> Iterator[None]:
        """Inside, while a step is recorded, kernels are launched on the stream of the network of that number."""
        if not is_recording():
            yield
            return
        if number % STREAMS not in self._streams:
            self._streams[number % STREAMS] = torch.cuda.Stream(self.first.fit.device)
        stream = self._streams[number % STREAMS]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


class Vmapped(Stack):
    """The weights of all networks are stacked, and one program runs over them (`torch.func.vmap`)."""

    def __init__(self, loops: Sequence[Loop]) -> None:
        super().__init__(loops)
        self.program = deepcopy(self.first.network)
        """The network into which vmap puts the weights of each."""
        self.same_order = len({loop.fit.seed for loop in loops}) == 1
        self.weights: dict[str, Tensor] = {}
        """Every trained parameter of all networks, (M, ...)."""
        self.buffers: dict[str, Tensor] = {}

    def require_gain(self) -> None:
        """`Unstackable` where a short trial shows that these networks are as fast one after another."""
        index = torch.arange(self.first.size)
        images = to_float(self.first.dataset.show(0, index)[0])
        networks = [deepcopy(loop.network).train() for loop in self.loops]
        weights, buffers = stack_module_state(networks)
        each = vmap(self._call, (0, 0, None))

        def alone() -> None:
            for network in networks:
                network(images).float().square().mean().backward()

        def together() -> None:
            each(weights, buffers, images).float().square().mean().backward()

        self.program.train()
        with alone_if_it_fails(self.loops), self.first.compute.backend(), self.first.compute.autocast(images.device):
            one, other = (min(_timed(step) for _ in range(TRIED)) for step in (alone, together))
        if other > GAIN * one:
            raise Unstackable(
                self.loops, f"Their step takes {1e3 * other:.1f} ms stacked and {1e3 * one:.1f} ms alone."
            )

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        """Inside, the parameters and buffers of all networks are rows of stacked ones."""
        self.program.train()
        networks = [loop.network for loop in self.loops]
        own = [{**dict(each.named_parameters()), **dict(each.named_buffers())} for each in networks]
        before = [{name: value.data for name, value in each.items()} for each in own]
        stacked = {name: torch.stack([each[name] for each in before]) for name in own[0]}
        for number, each in enumerate(own):
            for name, value in each.items():
                value.data = stacked[name][number]
        trained = {name for name, value in networks[0].named_parameters() if value.requires_grad}
        self.weights = {name: value.requires_grad_() for name, value in stacked.items() if name in trained}
        self.buffers = {name: value for name, value in stacked.items() if name not in trained}
        try:
            yield
        finally:
            for each, old in zip(own, before, strict=True):
                for name, value in each.items():
                    value.data = old[name].copy_(value.data)  # with the layout that it had

    def _step_all(self, index: Tensor, checks: bool) -> list[Tensor]:
        images = to_float(self.views[index[:1] if self.same_order else index]).expand(len(index), -1, -1, -1, -1)
        logits = self._forward(images)
        if checks:
            self._require_alike(images, logits)
        rows, losses, version = [], [], images._version
        for loop, own, shown, answers in zip(self.loops, index, images, logits, strict=True):
            batch = Batch.of(loop.dataset, self.epoch, own, shown, loop.dataset.labels(self.epoch, own))
            with alone_if_it_fails([loop]), undrawn(loop):
                loss, row = loop.loss(Member(shown, answers), batch)  # type: ignore[arg-type]
                if shown._version != version:
                    raise RuntimeError("The objective changes its images, which others see as well.")
            rows.append(row)
            losses.append(loss)
            loop.zero_grad()
        for stacked in self.weights.values():
            stacked.grad = None
        torch.stack(losses).sum().backward()
        for number, loop in enumerate(self.loops):
            self._take_gradients(loop, number)
            loop.update()
        return rows

    def _forward(self, images: Tensor) -> Tensor:
        """Logits (M, B, K) of each network for its own images (M, B, C, H, W)."""
        shared = self.same_order
        each = vmap(self._call, (0, 0, None if shared else 0))
        with alone_if_it_fails(self.loops), self.first.compute.autocast(images.device):
            logits: Tensor = each(self.weights, self.buffers, images[0] if shared else images)
        return logits

    def _call(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.program, (weights, buffers), (images,))
        return logits

    @torch.no_grad()
    def _require_alike(self, images: Tensor, logits: Tensor) -> None:
        """`Unstackable` for a network that answers otherwise when it is called by itself."""
        for number, loop in enumerate(self.loops):
            weights = {name: value[number] for name, value in self.weights.items()}
            buffers = {name: value[number].clone() for name, value in self.buffers.items()}
            with loop.compute.autocast(images.device):
                alone = functional_call(loop.network, (weights, buffers), (images[number],)).float()
            bound = TOLERANCE[loop.compute.precision] * alone.abs().max().clamp_min(1)
            if not (alone - logits[number].float()).abs().max() <= bound:
                raise Unstackable([loop], "Stacked weights give other answers.")

    def _take_gradients(self, loop: Loop, number: int) -> None:
        """Give a network its row of the gradients."""
        for name, parameter in loop.network.named_parameters():
            if parameter.grad is not None:
                raise Unstackable([loop], "The objective differentiates the network by itself.")
            if name in self.weights and (gradient := self.weights[name].grad) is not None:
                parameter.grad = gradient[number]


class Member:
    """A network of a stack, as its objective calls it: the answers to the batch are there already.

    It can be called once and nothing else, since whatever else an objective asks of a network it would have to answer.
    """

    def __init__(self, images: Tensor, logits: Tensor) -> None:
        self._images: Tensor | None = images
        self._logits = logits

    def __call__(self, images: Tensor) -> Tensor:
        if images is not self._images:
            raise RuntimeError("The objective calls the network on other images than the batch, or more than once.")
        self._images = None
        return self._logits

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"The objective reads '{name}' of the network.")


@contextmanager
def alone_if_it_fails(loops: Sequence[Loop]) -> Iterator[None]:
    """`Unstackable` instead of any error inside: alone, such a training goes on, or ends with its own error."""
    try:
        yield
    except Unstackable:
        raise
    except Exception as error:
        raise Unstackable(loops, f"{type(error).__name__}: {error}") from error


@contextmanager
def undrawn(loop: Loop) -> Iterator[None]:
    """`Unstackable` where random numbers are drawn inside: the generator is at another place than alone."""
    if is_recording():  # which a generator does not bear to be asked
        yield
        return
    before = generator_states(loop.fit.device)
    yield
    if not torch.equal(before, generator_states(loop.fit.device)):
        raise Unstackable([loop], "The training draws random numbers in its steps.")


def generator_states(device: torch.device) -> Tensor:
    """The states of torch's generators for main memory and for `device`, in one tensor."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began
