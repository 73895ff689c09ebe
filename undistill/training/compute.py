"""How a network is computed: precision, layout, compilation. Set by hand, or by a short trial (`autotune`)."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability as cpu_capability

from undistill.core import distributed
from undistill.core.errors import SpecError
from undistill.core.spec import Spec


class Compute(Spec):
    """`fp32`, `contiguous` and not compiled is exact: what every promise of equal bits is made for."""

    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16 is autocast: weights and losses stay in fp32, and on CUDA what remains may use TF32."""
    layout: Literal["contiguous", "channels_last", "auto"] = "contiguous"
    compile: bool | Literal["auto"] = False

    @property
    def exact(self) -> bool:
        return self == EXACT

    def prepare(self, network: nn.Module) -> nn.Module:
        """The module to call; `network` itself gets its weights in the layout."""
        self.lay_out(network)
        return self.compiled(network)

    def lay_out(self, network: nn.Module) -> None:
        """Put the weights into the layout, in place."""
        network.to(memory_format=self._memory_format)  # type: ignore[call-overload]

    def compiled(self, network: nn.Module) -> nn.Module:
        """The module to call.

        Compiled for static shapes: an epoch has at most two batch sizes, and steps are recorded as CUDA graphs.
        """
        compiled: nn.Module = torch.compile(network, dynamic=False) if self.compile else network  # type: ignore[assignment]
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

    def _eager(self) -> list["Compute"]:
        """The settings that `auto` in precision and layout allows, the likely best first."""
        precisions = ["bf16", "fp32"] if self.precision == "auto" else [self.precision]
        layouts = ["channels_last", "contiguous"] if self.layout == "auto" else [self.layout]
        return [Compute(precision=p, layout=la) for p in precisions for la in layouts]


EXACT = Compute()
FAST = Compute(precision="auto", layout="auto", compile="auto")


def machine(device: torch.device) -> list[str]:
    """Hardware on which bits may depend: the processor's instructions and threads, or the GPU's model."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    return [cpu_capability(), f"{torch.get_num_threads()} threads"]


def own_device(device: torch.device) -> torch.device:
    """The present GPU of this process in the place of the first one; other devices as they are."""
    if device.type != "cuda" or device.index:
        return device
    return torch.device("cuda", torch.cuda.current_device())


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


def pick_device(name: str) -> torch.device:
    """`auto`, or a device that is there; `SpecError` otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = distributed.local_device(name)
    try:
        tried = torch.zeros(1, device=name)
        tried.item()
    except Exception as error:  # torch raises many kinds for a device that is not there
        raise SpecError(f"Device '{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    return tried.device  # cuda:0 for cuda
