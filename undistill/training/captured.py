"""Training steps on a GPU without Python between their kernels: a step is recorded as a CUDA graph, and replayed.

A step of a small network takes far longer to launch than to compute. The graph holds all of it: forward pass, loss,
backward pass, clipping, optimisers and averages.
"""

import logging
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

log = logging.getLogger(__name__)

T = TypeVar("T")

LEAST = 8  # steps of one size in an epoch below which none is recorded

Step = Callable[..., Tensor]
"""One step of a training: from its inputs to what it adds to the record of the epoch, all on the device."""

_recording: ContextVar["Recording | None"] = ContextVar("recording", default=None)


class Recording:
    """What must be known of a step while it is recorded."""

    def __init__(self) -> None:
        self.acts: list[Callable[[], object]] = []
        """What is to be done at every replay."""
        self.kept: list[object] = []
        """What the graph reads and nobody else might keep."""


def is_recording() -> bool:
    """Whether what is launched now is recorded, and not done."""
    return _recording.get() is not None


def each_step(act: Callable[[], object]) -> None:
    """Do at each step what the device cannot: now, or before every replay of the step that is being recorded."""
    if recording := _recording.get():
        recording.acts.append(act)
    else:
        act()


def keep(thing: T) -> T:
    """The same thing, which a step reads and which may be forgotten elsewhere: a graph does not keep what it reads."""
    if recording := _recording.get():
        recording.kept.append(thing)
    return thing


class Steps:
    """The steps of a training. In each epoch the first with each shape of inputs is done as it is, and then replayed.

    They are recorded anew in every epoch, so that whatever an objective takes from the epoch, such as its answers or a
    weight that rises, is as it should be.
    """

    def __init__(self, step: Step, optimisers: Sequence[Optimizer], device: torch.device, why: str) -> None:
        self._step, self._optimisers = step, optimisers
        self.why = why
        """Why nothing is recorded; empty where it may be."""
        self._memory = None if why else GraphMemory(device)
        self._recorded: dict[torch.Size, Recorded] = {}

    @property
    def is_recorded(self) -> bool:
        """Whether steps of this epoch were recorded."""
        return bool(self._recorded)

    def new_epoch(self) -> None:
        """Forget what was recorded."""
        self._recorded = {}

    def __call__(self, *inputs: Tensor, left: int) -> Tensor:
        """One step; in this epoch `left` others with inputs of this shape are still to come."""
        recorded = self._recorded.get(inputs[0].shape)
        if recorded:
            return recorded(*inputs)
        if not self._memory or self.why or left < LEAST:
            return self._step(*inputs)
        before = host_generators()
        row = self._step(*inputs)
        if not all(given.is_cuda for given in inputs):
            self._give_up("its images do not lie on the GPU")
        elif before != host_generators():
            self._give_up("random numbers are drawn in main memory")
        else:
            self._record(inputs, self._memory)
        return row

    def _record(self, inputs: Sequence[Tensor], memory: "GraphMemory") -> None:
        try:
            self._recorded[inputs[0].shape] = Recorded(self._step, inputs, self._optimisers, memory)
        except Exception as error:  # an objective can do anything that a graph cannot hold
            self._give_up(": ".join([type(error).__name__, *str(error).splitlines()[:1]]))
            memory.mend()

    def _give_up(self, why: str) -> None:
        self.why = why
        log.info("The steps of this training are not recorded as a CUDA graph: %s", why)


def host_generators() -> bytes:
    """Where the generators of random numbers of Python, NumPy and torch are, for main memory."""
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))


class Recorded:
    """A step as a CUDA graph over inputs that stay where they are."""

    def __init__(
        self, step: Step, inputs: Sequence[Tensor], optimisers: Sequence[Optimizer], memory: "GraphMemory"
    ) -> None:
        self._inputs = [given.clone() for given in inputs]
        self._recording = Recording()
        with ExitStack() as stack:
            self._rates = [stack.enter_context(rates_on_device(optimiser)) for optimiser in optimisers]
            token = _recording.set(self._recording)
            stack.callback(_recording.reset, token)
            self._graph = stack.enter_context(memory.recording())
            self._row = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        for rates in self._rates:
            rates.refresh()
        for act in self._recording.acts:
            act()
        self._graph.replay()
        return self._row.clone()


class GraphMemory:
    """Memory that the graphs of one training use in turn, on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with self.recording() as self._keeper:  # a pool without any graph is given up
            torch.zeros(1, device=device)

    @contextmanager
    def recording(self) -> Iterator[torch.cuda.CUDAGraph]:
        """A graph of what is launched inside. Unlike torch's own recording, this one does not collect garbage."""
        with torch.cuda.device(self._device):
            graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    yield graph
                finally:
                    graph.capture_end()
            current.wait_stream(stream)

    def mend(self) -> None:
        """After a recording that failed: torch's generator waits for the end of one that succeeds."""
        GraphMemory(self._device)


class Rates:
    """Learning rates of an optimiser as numbers on the device, from which a graph reads them."""

    def __init__(self, optimiser: Optimizer) -> None:
        self._optimiser = optimiser
        groups = optimiser.param_groups
        self.on_device = [torch.zeros((), device=group["params"][0].device) for group in groups]

    def refresh(self) -> None:
        """Take over the rates that the schedule has set."""
        for own, group in zip(self.on_device, self._optimiser.param_groups, strict=True):
            own.fill_(group["lr"])


@contextmanager
def rates_on_device(optimiser: Optimizer) -> Iterator[Rates]:
    """Inside, a step of the optimiser reads its learning rates from the device and can be recorded."""
    rates, groups = Rates(optimiser), optimiser.param_groups
    before = [{name: value for name, value in group.items() if name in ("lr", "capturable")} for group in groups]
    for group, rate in zip(groups, rates.on_device, strict=True):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
    try:
        yield rates
    finally:
        for group, own in zip(groups, before, strict=True):
            group.update(own)
