"""Training steps on a GPU without Python between their kernels: a step is recorded as a CUDA graph, and replayed.

A step of a small network takes far longer to launch than to compute. The graph holds all of it: forward pass, loss,
backward pass, clipping, optimisers and averages.
"""

import gc
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
    """A step while it is recorded."""

    def __init__(self) -> None:
        self.acts: list[Callable[[], object]] = []
        """Done before every replay."""
        self.kept: list[object] = []
        """Held as long as the graph is, which reads them."""


def is_recording() -> bool:
    """Whether kernels that are launched now are recorded instead of run."""
    return _recording.get() is not None


def each_step(act: Callable[[], object]) -> None:
    """Call `act` in every step: now, or before each replay of the step that is being recorded."""
    if recording := _recording.get():
        recording.acts.append(act)
    else:
        act()


def keep(thing: T) -> T:
    """`thing`, kept alive as long as the graph that is being recorded, if any: a graph does not keep what it reads."""
    if recording := _recording.get():
        recording.kept.append(thing)
    return thing


class Steps:
    """The steps of a training. In each epoch the first with each shape of inputs is done as it is, and then replayed.

    They are recorded anew in every epoch, so that whatever an objective takes from the epoch, such as its answers or a
    weight that rises, is as it should be.
    """

    def __init__(
        self,
        step: Step,
        optimisers: Sequence[Optimizer],
        device: torch.device,
        why: str,
        passes: tuple[type[Exception], ...] = (),
    ) -> None:
        """`passes` are errors of a recording that go on to the caller; others mean that nothing is recorded."""
        self._step: Step | None = step
        self._optimisers, self._device, self._passes = optimisers, device, passes
        self.why = why
        """Why nothing is recorded; empty where it may be."""
        self._memory: GraphMemory | None = None
        self._recorded: dict[torch.Size, Recorded] = {}

    def close(self) -> None:
        """Release the graphs, and the training, which holds these steps: else a garbage collection would have to."""
        self._step, self._optimisers, self._memory, self._recorded = None, (), None, {}

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
        assert self._step is not None
        if self.why or left < LEAST:
            return self._step(*inputs)
        before = host_generators()
        row = self._step(*inputs)
        if not all(given.is_cuda for given in inputs):
            self._give_up("its images do not lie on the GPU")
        elif before != host_generators():
            self._give_up("random numbers are drawn in main memory")
        else:
            self._record(self._step, inputs)
        return row

    def _record(self, step: Step, inputs: Sequence[Tensor]) -> None:
        why: Exception | None = None
        try:
            self._memory = self._memory or GraphMemory(self._device)
            self._recorded[inputs[0].shape] = Recorded(step, inputs, self._optimisers, self._memory)
        except Exception as error:  # an objective can do anything that a graph cannot hold
            why = error.with_traceback(None)  # which would hold what was recorded
        if why is None:
            return
        mend(self._device)
        if isinstance(why, self._passes):
            raise why
        self._give_up(": ".join([type(why).__name__, *str(why).splitlines()[:1]]))

    def _give_up(self, why: str) -> None:
        self.why = why
        log.info("The steps of this training are not recorded as a CUDA graph: %s", why)


def host_generators() -> bytes:
    """States of the random generators of Python, NumPy and torch for main memory."""
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
    """Memory that the graphs of one training use in turn, on one GPU.

    All are recorded on one stream: what another stream has freed cannot be used again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        with self.recording() as self._keeper:  # a pool without any graph is given up
            torch.zeros(1, device=device)

    @contextmanager
    def recording(self) -> Iterator[torch.cuda.CUDAGraph]:
        """A graph of what is launched inside."""
        with torch.cuda.device(self._device), uncollected():
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    yield graph
                except BaseException:
                    with suppress(Exception):  # it says only that something failed before
                        graph.capture_end()
                    with suppress(Exception):  # left open by torch before 2.12
                        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                    raise
                graph.capture_end()
            current.wait_stream(self._stream)


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python collects no garbage: a graph that ends during the recording of another one breaks that."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def mend(device: torch.device) -> None:
    """After a recording that failed: torch's generator waits for the end of one that succeeds."""
    with suppress(Exception):
        GraphMemory(device)


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
