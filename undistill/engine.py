"""How a network is computed: precision, layout, compilation; set by hand, or settled by a short measured trial."""

import contextlib
import ctypes
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import Tensor, nn

from undistill import distributed
from undistill.errors import ModelError, SpecError
from undistill.files import read_json, write_json
from undistill.losses import cross_entropy
from undistill.models import seeded
from undistill.spec import Spec

COMPILING_PAYS = 300.0  # seconds of training below which compiling is not even tried: it takes half a minute
FAR = 1.5  # an engine whose second step takes so many times the best one's is given up
TRIAL_LOCK = "engine.lock"
GAIN = 0.97  # compiled code must take at most this share of the time without


class Engine(Spec):
    """`fp32`, `contiguous` and not compiled is exact: what every promise of equal bits is made for."""

    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16 is autocast: weights and losses stay in fp32, and on CUDA what remains may use TF32."""
    layout: Literal["contiguous", "channels_last", "auto"] = "contiguous"
    compile: bool | Literal["auto"] = False

    @property
    def exact(self) -> bool:
        return self == EXACT

    def prepare(self, network: nn.Module, training: bool = True) -> nn.Module:
        """The module to call; `network` itself gets its weights in the layout."""
        self.lay_out(network)
        return self.compiled(network, training)

    def lay_out(self, network: nn.Module) -> None:
        """Put the weights into the layout, in place."""
        network.to(memory_format=self._memory_format)  # type: ignore[call-overload]

    def compiled(self, network: nn.Module, training: bool = True) -> nn.Module:
        """The module to call. Each size of batch is compiled for itself: there are two, and CUDA graphs need it."""
        if not self.compile:
            return network
        on_cuda = any(parameter.is_cuda for parameter in network.parameters())
        mode = "reduce-overhead" if on_cuda and training else None
        compiled: nn.Module = torch.compile(network, mode=mode, dynamic=False)  # type: ignore[assignment]
        return compiled

    def laid_out(self, images: Tensor) -> Tensor:
        """The same images (B, C, H, W), in the layout."""
        return images.contiguous(memory_format=self._memory_format)

    @contextlib.contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Networks called inside are computed so."""
        with self.backend(), self.autocast(device):
            yield

    @contextlib.contextmanager
    def backend(self) -> Iterator[None]:
        """How libraries compute inside, which must hold for the backward pass as well."""
        fast = self.precision == "bf16"
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if fast else "highest")
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=fast, deterministic=not fast, allow_tf32=fast):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def autocast(self, device: torch.device) -> torch.autocast:
        """For the forward pass alone. Casts are not kept: an attack may step its own network inside."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    def _eager(self) -> list["Engine"]:
        """What `auto` in precision and layout may mean, the likely best first."""
        precisions = ["bf16", "fp32"] if self.precision == "auto" else [self.precision]
        layouts = ["channels_last", "contiguous"] if self.layout == "auto" else [self.layout]
        return [Engine(precision=p, layout=la) for p in precisions for la in layouts]


EXACT = Engine()
FAST = Engine(precision="auto", layout="auto", compile="auto")


def settle(
    engine: Engine,
    network: nn.Module,
    sample: Callable[[], Tensor],
    *,
    steps: int,
    training: bool,
    folder: Path | None = None,
) -> Engine:
    """The fastest engine that `engine` allows for `network` on a sample of its images, (B, C, H, W) in [0, 1].

    Measured once: a trial is recorded in `folder` and found there again, so that a resumed run is
    computed as it was begun. Raises `ModelError` where no allowed engine can compute the network.
    """
    if engine.exact:
        return engine
    trial = _Trial(network, sample(), training)
    file = folder / f"{trial.key(engine, steps)}.json" if folder else None
    with _alone(file):
        found = distributed.from_first(_recorded(file))
        if found is None:
            found = trial.fastest(engine, steps) if distributed.rank() == 0 else None
            found = distributed.from_first(found)
            assert found is not None
            if file:
                with contextlib.suppress(OSError):  # what cannot be recorded is measured again
                    write_json(file, trial.record(engine, found))
    return found


def _recorded(file: Path | None) -> Engine | None:
    """The choice of an earlier trial; None where there is none, or it is damaged."""
    found = read_json(file) if file else None
    try:
        return Engine.parse(str(found["engine"])) if found else None
    except (KeyError, SpecError):
        return None


@contextlib.contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Of several processes that lack the same trial, one measures while the others wait for its record."""
    with contextlib.ExitStack() as stack:
        if file and distributed.rank() == 0:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(file.with_name(TRIAL_LOCK)))
        yield


class _Trial:
    """Times one step of a copy of the network, for each of several engines."""

    def __init__(self, network: nn.Module, images: Tensor, training: bool) -> None:
        self.network, self.images, self.training = network, images, training
        self.seconds: dict[str, float] = {}
        self.refused: dict[str, str] = {}

    def fastest(self, asked: Engine, steps: int) -> Engine:
        for engine in asked._eager():
            self._try(engine)
        if not self.seconds:
            name, why = next(iter(self.refused.items()))
            raise ModelError(f"The network cannot be computed with {name}: {why}. Set recipe.engine to another one.")
        best = min(self.seconds, key=self.seconds.__getitem__)
        chosen, expected = Engine.parse(best), self.seconds[best] * steps
        if not asked.compile or (asked.compile == "auto" and expected < COMPILING_PAYS):
            return chosen
        compiled = chosen.model_copy(update={"compile": True})
        self._try(compiled)
        if asked.compile is True and str(compiled) in self.refused:
            raise ModelError(f"The network cannot be compiled: {self.refused[str(compiled)]}.")
        pays = self.seconds.get(str(compiled), float("inf")) < GAIN * self.seconds[best]
        return compiled if asked.compile is True or pays else chosen

    def _try(self, engine: Engine) -> None:
        best = min(self.seconds.values(), default=float("inf"))
        try:
            with seeded(0):
                step = self._step(engine)
                # compiled code records its CUDA graphs in the steps after the first
                warm_up = [_timed(step) for _ in range(4 if engine.compile else 2)]
                if engine.compile or warm_up[-1] < FAR * best:
                    self.seconds[str(engine)] = statistics.median(_timed(step) for _ in range(3))
        except Exception as error:  # whatever layout or compiler cannot do with this network
            said = str(error).strip().splitlines()
            self.refused[str(engine)] = ": ".join([type(error).__name__, *said[:1]])

    def _step(self, engine: Engine) -> "_Step":
        return _Step(engine, deepcopy(self.network), self.images, self.training)

    def key(self, asked: Engine, steps: int) -> str:
        """Names what the choice depends on; how long the training is, where compiling may not be worth it."""
        parts = [
            str(asked),
            steps if asked.compile == "auto" else 0,
            repr(self.network),
            list(self.images.shape),
            *machine(self.images.device),
            self.training,
        ]
        return "engine-" + hashlib.sha256(json.dumps([*parts, torch.__version__]).encode()).hexdigest()[:16]

    def record(self, asked: Engine, chosen: Engine) -> dict[str, object]:
        return {"asked": str(asked), "engine": str(chosen), "seconds": self.seconds, "refused": self.refused} | {
            "training": self.training,
            "batch": list(self.images.shape),
            "machine": machine(self.images.device),
        }


class _Step:
    """One step of plain training, or one answer."""

    def __init__(self, engine: Engine, network: nn.Module, images: Tensor, training: bool) -> None:
        self.engine, self.training = engine, training
        self.network = engine.prepare(network.to(images.device).train(training), training)
        self.images = engine.laid_out(images)

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.training), self.engine.backend():
            with self.engine.autocast(self.images.device):
                logits = self.network(self.images)
            if self.training:
                self.network.zero_grad()
                cross_entropy(logits, logits.argmax(1)).backward()
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)


def _timed(step: _Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def machine(device: torch.device) -> list[str]:
    """What bits may depend on beside the code: the processor's instructions and threads, or the GPU's model."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    return [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]


def keep_freed_memory() -> None:
    """Let glibc keep large blocks for the next step instead of returning them; saves their page faults.

    Changes the whole process, so only our own commands and workers call it.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
    if mallopt:
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
