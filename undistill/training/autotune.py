"""The fastest way to compute a network on this machine, found by a short measured trial."""

import contextlib
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability as cpu_capability

from undistill.core import distributed
from undistill.core.child import FORKS, in_child
from undistill.core.errors import ModelError
from undistill.core.files import locked, machine_key, read_json, seal, unseal, write_json
from undistill.core.identity import fingerprint
from undistill.core.seeds import seeded
from undistill.training.captured import GraphMemory, Recorded, mend
from undistill.training.compute import EXACT, Compute, machine
from undistill.training.losses import cross_entropy

COMPILING_PAYS = 300.0  # seconds of training below which compiling is not even tried: it takes half a minute


FAR = 1.5  # settings whose second step takes so many times the best one's are given up


TRIAL_LOCK = "autotune.lock"


GAIN = 0.97  # compiled code must take at most this share of the time without


CHECKED = 32  # images on which settings are compared with the exact ones


TOLERANCE = {"fp32": 1e-3, "bf16": 0.3}  # relative; gradients of good bf16 are up to 0.15 away, those of fp32 1e-6


def autotune(
    compute: Compute,
    network: nn.Module,
    sample: Callable[[], Tensor],
    *,
    steps: int,
    training: bool,
    folder: Path | None = None,
    beside: Sequence[nn.Module] = (),
) -> Compute:
    """The fastest settings that `compute` allows for `network`, timed on a sample of its images (B, C, H, W) in [0, 1].

    Measured once: a trial is recorded in `folder` and found there again by the same machine, so that a resumed run is
    computed as it was begun. `beside` are networks that get the same layout. Raises `ModelError` where no allowed
    settings can compute the network.
    """
    if compute.exact:
        return compute
    trial = _Trial(network, sample(), training, beside)
    key = trial.key(compute, steps)
    file = folder / f"{key}.json" if folder else None
    with _alone(file):
        found = distributed.broadcast(_recorded(file, key))
        if found is None:
            found = trial.fastest(compute, steps) if distributed.rank() == 0 else None
            found = distributed.broadcast(found)
            assert found is not None
            if file:
                with contextlib.suppress(OSError):  # what cannot be recorded is measured again
                    write_json(file, seal(trial.record(compute, found) | {"key": key}, machine_key()))
    return found


def _recorded(file: Path | None, key: str) -> Compute | None:
    """The choice of an earlier trial on this machine; None where there is none, or it is another's, or damaged."""
    record = (read_json(file) if file else None) or {}
    found = unseal(record, machine_key()) if record else None
    return Compute.parse(str(found["compute"])) if found and found["key"] == key else None


@contextlib.contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Let one process measure while others that need the same trial wait for its record."""
    with contextlib.ExitStack() as stack:
        if file and distributed.rank() == 0:
            with contextlib.suppress(OSError):
                stack.enter_context(locked(file.with_name(TRIAL_LOCK)))
        yield


class _Trial:
    """Times one step of a copy of the network, with each of several compute settings."""

    def __init__(self, network: nn.Module, images: Tensor, training: bool, beside: Sequence[nn.Module]) -> None:
        self.network, self.images, self.training, self.beside = network, images, training, beside
        self.seconds: dict[str, float] = {}
        self.refused: dict[str, str] = {}

    def fastest(self, asked: Compute, steps: int) -> Compute:
        for compute in asked._eager():
            self._try(compute)
        if not self.seconds:
            name, why = next(iter(self.refused.items()))
            raise ModelError(
                f"The network cannot be computed with {name}: {why.rstrip('.')}. Set recipe.compute to another one."
            )
        best = min(self.seconds, key=self.seconds.__getitem__)
        chosen, expected = Compute.parse(best), self.seconds[best] * steps
        if not asked.compile or (asked.compile == "auto" and expected < COMPILING_PAYS):
            return chosen
        compiled = chosen.model_copy(update={"compile": True})
        self._try(compiled)
        if asked.compile is True and str(compiled) in self.refused:
            raise ModelError(f"The network cannot be compiled: {self.refused[str(compiled)]}.")
        pays = self.seconds.get(str(compiled), float("inf")) < GAIN * self.seconds[best]
        return compiled if asked.compile is True or pays else chosen

    def _try(self, compute: Compute) -> None:
        best = min(self.seconds.values(), default=float("inf"))
        why = "" if compute.exact or compute.compile else self._fault(compute)
        try:
            if not why:
                with seeded(0):
                    step = self._step(compute)
                    step()
                    step.record()
                    if _timed(step) < FAR * best or compute.compile:
                        self.seconds[str(compute)] = statistics.median(_timed(step) for _ in range(3))
                    if compute.compile:  # tried after its eager twin, and not in a child, which would compile it again
                        why = self._difference(compute, step)
        except Exception as error:  # whatever layout or compiler cannot do with this network
            why = _summary(error)
        if why:
            self.refused[str(compute)] = why
            self.seconds.pop(str(compute), None)

    def _fault(self, compute: Compute) -> str:
        """Why `compute` cannot be used, though it may be fast: it crashes, or computes something else."""
        for network in (self.network, *self.beside):
            if why := known_fault(network, compute):
                return why
        return in_child(lambda: self._check(compute)) if may_fork() else self._check(compute)

    def _check(self, compute: Compute) -> str:
        """First one step of training, which must not crash; then loss and gradients are compared."""
        images = self.images[:CHECKED]
        try:
            with seeded(0):
                _Step(compute, deepcopy(self.network), images, self.training)()
                return self._difference(compute, _Step(compute, deepcopy(self.network), images, self.training))
        except Exception as error:  # whatever this layout cannot do with this network
            return _summary(error)

    def _difference(self, compute: Compute, step: "_Step") -> str:
        """How loss and gradients, or answers, differ from exact ones by more than `TOLERANCE`; empty if they do not.

        They are compared in eval mode: dropout depends on the layout, and batch norm in training magnifies rounding.
        """
        exact = _Step(EXACT, deepcopy(step.eager), step.images, self.training).outcome()
        allowed = TOLERANCE[compute.precision]
        for what, value in step.outcome().items():
            far = ((value - exact[what]).norm() / exact[what].norm().clamp_min(1e-12)).item()
            if not far <= allowed:
                return f"{what} {far:.1e} away from the exact one, relative; rounding is at most {allowed:g}"
        return ""

    def _step(self, compute: Compute) -> "_Step":
        return _Step(compute, deepcopy(self.network), self.images, self.training)

    def key(self, asked: Compute, steps: int) -> str:
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
        return f"autotune-{fingerprint(*parts, torch.__version__)[:16]}"

    def record(self, asked: Compute, chosen: Compute) -> dict[str, object]:
        return {"asked": str(asked), "compute": str(chosen), "seconds": self.seconds, "refused": self.refused} | {
            "training": self.training,
            "batch": list(self.images.shape),
            "machine": machine(self.images.device),
        }


class _Step:
    """One step of plain training, or one answer."""

    def __init__(self, compute: Compute, network: nn.Module, images: Tensor, training: bool) -> None:
        self.compute, self.training, self.eager = compute, training, network.to(images.device).train(training)
        self.network = compute.prepare(self.eager)
        self.images = compute.laid_out(images)
        self.recorded: Recorded | None = None

    def record(self) -> None:
        """On a GPU, replay the step from now on, as trainings do; where it cannot be recorded, it stays as it is."""
        if self.training and self.images.is_cuda:
            try:
                memory = GraphMemory(self.images.device)
                self.recorded = Recorded(lambda: self._run()[1].detach(), [], [], memory)
            except Exception:  # whatever this network does that a graph cannot hold
                mend(self.images.device)

    def __call__(self) -> None:
        if self.recorded:
            self.recorded()
        else:
            self._run()
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)

    def outcome(self) -> dict[str, Tensor]:
        """Loss and gradients in eval mode; answers where nothing is trained. Gradients that are not there are zero."""
        self.network.eval()
        logits, loss = self._run()
        if not self.training:
            return {"answers": logits.detach().double()}
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.network.parameters()]
        return {"loss": loss.detach().double(), "gradients": torch.cat([g.flatten().double() for g in gradients])}

    def _run(self) -> tuple[Tensor, Tensor]:
        """Logits and loss; in training also the gradients."""
        with torch.set_grad_enabled(self.training), self.compute.backend():
            with self.compute.autocast(self.images.device):
                logits = self.network(self.images)
            labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
            loss = cross_entropy(logits, labels)
            if self.training:
                self.network.zero_grad()
                loss.backward()
        return logits, loss


def may_fork() -> bool:
    """Whether a child may compute gradients: not where there is a GPU, whose threads of autograd a fork breaks."""
    return FORKS and not torch.cuda.is_available()


def known_fault(network: nn.Module, compute: Compute) -> str:
    """A fault of torch's native code on this processor that these compute settings would meet; empty if none is known.

    Seen in torch 2.13.0 on processors with AVX2 and no AVX-512: the backward pass of a strided 1 x 1 convolution with
    fewer than 8 input channels, channels_last and fp32, writes beyond its memory.
    """
    if compute.layout != "channels_last" or compute.precision != "fp32" or cpu_capability() != "AVX2":
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
