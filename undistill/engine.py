"""How a network is computed: precision, layout, compilation; set by hand, or settled by a short measured trial."""

import contextlib
import ctypes
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability as cpu_capability

from undistill import distributed
from undistill.child import FORKS, in_child
from undistill.errors import ModelError
from undistill.files import machine_key, read_json, seal, sweep, unseal, write_json
from undistill.losses import cross_entropy
from undistill.models import seeded
from undistill.spec import Spec

COMPILING_PAYS = 300.0  # seconds of training below which compiling is not even tried: it takes half a minute
FAR = 1.5  # an engine whose second step takes so many times the best one's is given up
TRIAL_LOCK = "engine.lock"
GAIN = 0.97  # compiled code must take at most this share of the time without
CHECKED = 32  # images on which an engine is compared with the exact one
TOLERANCE = {"fp32": 1e-3, "bf16": 0.3}  # relative; gradients of good bf16 are up to 0.15 away, those of fp32 1e-6


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
    beside: Sequence[nn.Module] = (),
) -> Engine:
    """The fastest engine that `engine` allows for `network` on a sample of its images, (B, C, H, W) in [0, 1].

    Measured once: a trial is recorded in `folder` and found there again by the same machine, so that a resumed run is
    computed as it was begun. `beside` are networks that get the same layout. Raises `ModelError` where no allowed
    engine can compute the network.
    """
    if engine.exact:
        return engine
    trial = _Trial(network, sample(), training, beside)
    key = trial.key(engine, steps)
    file = folder / f"{key}.json" if folder else None
    with _alone(file):
        found = distributed.from_first(_recorded(file, key))
        if found is None:
            found = trial.fastest(engine, steps) if distributed.rank() == 0 else None
            found = distributed.from_first(found)
            assert found is not None
            if file:
                with contextlib.suppress(OSError):  # what cannot be recorded is measured again
                    write_json(file, seal(trial.record(engine, found) | {"key": key}, machine_key()))
    return found


def _recorded(file: Path | None, key: str) -> Engine | None:
    """The choice of an earlier trial on this machine; None where there is none, or it is another's, or damaged."""
    record = (read_json(file) if file else None) or {}
    found = unseal(record, machine_key()) if record else None
    return Engine.parse(str(found["engine"])) if found and found["key"] == key else None


@contextlib.contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Of several processes that lack the same trial, one measures while the others wait for its record."""
    with contextlib.ExitStack() as stack:
        if file and distributed.rank() == 0:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(file.with_name(TRIAL_LOCK)))
                sweep(file.parent)
        yield


class _Trial:
    """Times one step of a copy of the network, for each of several engines."""

    def __init__(self, network: nn.Module, images: Tensor, training: bool, beside: Sequence[nn.Module]) -> None:
        self.network, self.images, self.training, self.beside = network, images, training, beside
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
        why = "" if engine.exact or engine.compile else self._fault(engine)
        try:
            if not why:
                with seeded(0):
                    step = self._step(engine)
                    # compiled code records its CUDA graphs in the steps after the first
                    warm_up = [_timed(step) for _ in range(4 if engine.compile else 2)]
                    if engine.compile or warm_up[-1] < FAR * best:
                        self.seconds[str(engine)] = statistics.median(_timed(step) for _ in range(3))
                    if engine.compile:  # tried after its eager twin, and not in a child, which would compile it again
                        why = self._difference(engine, step)
        except Exception as error:  # whatever layout or compiler cannot do with this network
            why = _summary(error)
        if why:
            self.refused[str(engine)] = why
            self.seconds.pop(str(engine), None)

    def _fault(self, engine: Engine) -> str:
        """Why `engine` cannot be used, though it may be fast: it crashes, or computes something else."""
        for network in (self.network, *self.beside):
            if why := known_fault(network, engine):
                return why
        return in_child(lambda: self._check(engine)) if _may_fork() else self._check(engine)

    def _check(self, engine: Engine) -> str:
        """First one step of training, which must not crash; then loss and gradients are compared."""
        images = self.images[:CHECKED]
        try:
            with seeded(0):
                _Step(engine, deepcopy(self.network), images, self.training)()
                return self._difference(engine, _Step(engine, deepcopy(self.network), images, self.training))
        except Exception as error:  # whatever this layout cannot do with this network
            return _summary(error)

    def _difference(self, engine: Engine, step: "_Step") -> str:
        """How loss and gradients, or answers, differ from the exact engine's beyond `TOLERANCE`; empty if they do not.

        They are compared in eval mode: dropout depends on the layout, and batch norm in training magnifies rounding.
        """
        exact = _Step(EXACT, deepcopy(step.eager), step.images, self.training).outcome()
        allowed = TOLERANCE[engine.precision]
        for what, value in step.outcome().items():
            far = ((value - exact[what]).norm() / exact[what].norm().clamp_min(1e-12)).item()
            if not far <= allowed:
                return f"{what} {far:.1e} away from the exact engine's, relative; rounding is at most {allowed:g}"
        return ""

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
            hashlib.sha256(machine_key()).hexdigest(),  # machines that share a folder do not overwrite each other's
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
        self.engine, self.training, self.eager = engine, training, network.to(images.device).train(training)
        self.network = engine.prepare(self.eager, training)
        self.images = engine.laid_out(images)

    def __call__(self) -> None:
        self._compute()
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)

    def outcome(self) -> dict[str, Tensor]:
        """Loss and gradients in eval mode; answers where nothing is trained. Gradients that are not there are zero."""
        self.network.eval()
        logits, loss = self._compute()
        if not self.training:
            return {"answers": logits.detach().double()}
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.network.parameters()]
        return {"loss": loss.detach().double(), "gradients": torch.cat([g.flatten().double() for g in gradients])}

    def _compute(self) -> tuple[Tensor, Tensor]:
        """Logits and loss; in training also the gradients."""
        with torch.set_grad_enabled(self.training), self.engine.backend():
            with self.engine.autocast(self.images.device):
                logits = self.network(self.images)
            labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
            loss = cross_entropy(logits, labels)
            if self.training:
                self.network.zero_grad()
                loss.backward()
        return logits, loss


def _may_fork() -> bool:
    """Whether a child may compute gradients: not where there is a GPU, whose threads of autograd a fork breaks."""
    return FORKS and not torch.cuda.is_available()


def known_fault(network: nn.Module, engine: Engine) -> str:
    """A fault of torch's native code on this processor that this engine would meet; empty if none is known.

    Seen in torch 2.13.0 on processors with AVX2 and no AVX-512: the backward pass of a strided 1 x 1 convolution with
    fewer than 8 input channels, channels_last and fp32, writes beyond its memory.
    """
    if engine.layout != "channels_last" or engine.precision != "fp32" or cpu_capability() != "AVX2":
        return ""
    strided = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1}
    for name, module in strided.items():
        if module.kernel_size == (1, 1) and module.in_channels // module.groups < 8:
            return f"torch corrupts memory in {name}, a strided 1 x 1 convolution of few channels, without AVX-512"
    return ""


def _summary(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _timed(step: _Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def machine(device: torch.device) -> list[str]:
    """What bits may depend on beside the code: the processor's instructions and threads, or the GPU's model."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    return [cpu_capability(), f"{torch.get_num_threads()} threads"]


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
