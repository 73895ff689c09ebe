"""Training steps on a GPU without Python between their kernels: a step is recorded as a CUDA graph, and replayed.

A step of a small network takes far longer to launch than to compute. The graph holds all of it: forward pass, loss,
backward pass, clipping, optimisers and averages.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.optim import Optimizer

log = logging.getLogger(__name__)

LEAST = 8  # steps of one size in an epoch below which none is recorded

Step = Callable[..., Tensor]
"""One step of a training: from its inputs to what it adds to the record of the epoch, all on the device."""

_acts: ContextVar[list[Callable[[], object]] | None] = ContextVar("acts", default=None)


def each_step(act: Callable[[], object]) -> None:
    """Do at each step what the device cannot: now, or before every replay of the step that is being recorded."""
    acts = _acts.get()
    if acts is None:
        act()
    else:
        acts.append(act)


class Steps:
    """The steps of a training. In each epoch the first with each shape of inputs is done as it is, and then replayed.

    They are recorded anew in every epoch, so that whatever an objective takes from the epoch, such as its answers or a
    weight that rises, is as it should be.
    """

    def __init__(self, step: Step, optimisers: Sequence[Optimizer], why: str) -> None:
        self._step, self._optimisers = step, optimisers
        self.why = why
        """Why nothing is recorded; empty where it may be."""
        self._memory = None if why else GraphMemory()
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
        row = self._step(*inputs)
        if self._memory and not self.why and left >= LEAST:
            self._record(inputs, self._memory)
        return row

    def _record(self, inputs: Sequence[Tensor], memory: "GraphMemory") -> None:
        try:
            self._recorded[inputs[0].shape] = Recorded(self._step, inputs, self._optimisers, memory)
        except Exception as error:  # an objective can do anything that a graph cannot hold
            self.why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            log.info("The steps of this training are not recorded as a CUDA graph. %s", self.why)


class Recorded:
    """A step as a CUDA graph over inputs that stay where they are."""

    def __init__(
        self, step: Step, inputs: Sequence[Tensor], optimisers: Sequence[Optimizer], memory: "GraphMemory"
    ) -> None:
        self._inputs = [given.clone() for given in inputs]
        self._acts: list[Callable[[], object]] = []
        with ExitStack() as stack:
            self._rates = [stack.enter_context(rates_on_device(optimiser)) for optimiser in optimisers]
            token = _acts.set(self._acts)
            stack.callback(_acts.reset, token)
            self._graph = stack.enter_context(memory.recording())
            self._row = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        for rates in self._rates:
            rates.refresh()
        for act in self._acts:
            act()
        self._graph.replay()
        return self._row.clone()


class GraphMemory:
    """Memory that the graphs of one training use in turn."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        with self.recording() as self._keeper:  # a pool without any graph is given up
            torch.zeros(1, device="cuda")

    @contextmanager
    def recording(self) -> Iterator[torch.cuda.CUDAGraph]:
        """A graph of what is launched inside. Unlike torch's own recording, this one does not collect garbage."""
        graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield graph
            finally:
                graph.capture_end()
        current.wait_stream(stream)


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
