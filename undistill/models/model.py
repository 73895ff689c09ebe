"""`Model`: the one factory of networks, and what every network must be."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from undistill.core.code import is_code
from undistill.core.errors import ModelError, unknown
from undistill.core.files import MIB, open_regular, read_bytes
from undistill.core.seeds import seeded
from undistill.core.spec import Spec
from undistill.core.tensors import LARGEST, load_state

Shape = tuple[int, int, int]  # channels, height, width


class Model(Spec):
    """An architecture: `ConvNet(width=32)`, or the user's own as `file.py:factory`."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a spec; `file.py:factory(...)` becomes a `Factory`, `timm:NAME` a network of timm."""
        if text.strip().startswith("timm:"):
            return cls._find("Timm")(name=text.strip().removeprefix("timm:"))  # type: ignore[call-arg]
        return cls._find("Factory")(call=text) if is_code(text) else super().parse(text)  # type: ignore[call-arg]

    @abstractmethod
    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        """A new network for images of `shape`."""

    def stages(self, network: nn.Module) -> Sequence[nn.Module]:
        """The parts of a network of ours after which its feature maps can be read, from the input to the output.

        A network of the user's own names them: `network.stages = ["layer1", "layer2"]`. `ModelError` where there are
        none.
        """
        named = getattr(network, "stages", None)
        if not isinstance(named, list | tuple) or not named:
            raise ModelError(
                f"{self} names no stages, which this attack reads. Give the network an attribute that names them, such "
                "as network.stages = ['layer1', 'layer2'], or leave the attack out."
            )
        parts = dict(network.named_modules())
        if missing := [name for name in named if name not in parts]:
            raise ModelError(unknown(f"part of {self}", str(missing[0]), parts))
        return [parts[name] for name in named]

    def build(self, shape: Shape, num_classes: int, seed: int) -> nn.Module:
        """A network initialised by `seed`, tried on two blank images; `ModelError` if it is no classifier."""
        with seeded(seed):
            try:
                network = self.network(shape, num_classes)
            except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
                raise ModelError(f"{self} cannot be built: {str(error).splitlines()[0]}") from None
            check(network, shape, num_classes, str(self))
        return network


def check(network: nn.Module, shape: Shape, num_classes: int, name: str, *, finite: bool = True) -> None:
    """Raise `ModelError` unless `network` maps (2, C, H, W) images to finite (2, K) logits, trained or in training."""
    if not isinstance(network, nn.Module):
        raise ModelError(f"{name} returned {type(network).__name__}; a factory must return a torch.nn.Module.")
    try:
        trial = deepcopy(network)  # a forward pass in training mode changes batch-norm statistics
        with torch.no_grad():
            blank = torch.zeros(2, *shape, device=device_of(network))
            answers = {mode: trial.train(mode == "training")(blank) for mode in ("training", "eval")}
    except Exception as error:
        raise ModelError(
            f"{name} failed on images of shape {shape} (channels, height, width): {type(error).__name__}: {error}"
        ) from error
    for mode, logits in answers.items():
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes) or not logits.is_floating_point():
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"{name} answers two images with {found} in {mode} mode; for {num_classes} classes it must return "
                f"logits of shape (2, {num_classes})."
            )
    if finite and not answers["eval"].isfinite().all():
        raise ModelError(f"{name} answers a blank image with NaN or infinity; its weights are not usable.")


def returned(network: object, by: Spec, shape: Shape, num_classes: int) -> nn.Module:
    """The network that an attack or defence returned; `ModelError` unless it classifies such images."""
    if not isinstance(network, nn.Module):
        raise ModelError(f"{by} returned {type(network).__name__}; it must return the network that it trained.")
    check(network, shape, num_classes, f"The network of {by}", finite=False)
    return network


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file, or a state dict saved by torch. Pickled modules are refused unread.

    Raises `ModelError` for weights of another architecture, and for those that the network cannot hold as they are:
    sparse, quantised, complex, without data, or not finite in the network's own precision.
    """
    own = network.state_dict()
    state = read_state(path, largest_weights(network))
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the network's is {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    problems = [
        *([f"missing {missing[0]} and {len(missing) - 1} more"] if missing else []),
        *([f"unexpected {extra[0][:100]} and {len(extra) - 1} more"] if extra else []),
        *sorted(shapes)[:1],
    ]
    if problems:
        raise ModelError(f"{path} holds the weights of another architecture: {'; '.join(problems)}.")
    network.load_state_dict({name: _fitting(value, own[name], f"{path}: {name}") for name, value in state.items()})


def largest_weights(network: nn.Module) -> int:
    """Bytes of a file with weights for `network`: in double precision, with optimiser and averages, and some more."""
    return 16 * sum(int(value.nbytes) for value in network.state_dict().values()) + 256 * MIB


def _fitting(value: Tensor, own: Tensor, name: str) -> Tensor:
    """`value` in the type of the network's own tensor; `ModelError` if that would be something else."""
    kinds = {"sparse": value.layout != torch.strided, "quantised": value.is_quantized, "without data": value.is_meta}
    kinds["complex"] = value.is_complex() and not own.is_complex()
    for kind, found in kinds.items():
        if found:
            raise ModelError(f"{name} is {kind}; convert it to a plain tensor of {own.dtype}.")
    try:
        numbers = value.double() if value.is_floating_point() else value
        held = numbers.to(own.dtype)
    except (RuntimeError, NotImplementedError):
        raise ModelError(f"{name} is {value.dtype}, which torch cannot convert to {own.dtype}.") from None
    for tensor in (numbers, held):
        if not tensor.isfinite().all():
            raise ModelError(f"{name} holds NaN or infinity as {own.dtype}; these weights are not usable.")
    if not own.is_floating_point() and not own.is_complex() and not torch.equal(held.to(numbers.dtype), numbers):
        raise ModelError(f"{name} holds numbers that {own.dtype} cannot; these weights are not usable.")
    return held


def read_state(path: Path, largest: int = LARGEST) -> dict[str, Tensor]:
    """The tensors in a safetensors or torch file, by name; nothing in it is executed."""
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load(read_bytes(path, largest))
        open_regular(path, largest).close()
        state = load_state(path, torch.device("cpu"))
    except (SafetensorError, KeyError) as error:  # KeyError: a type that the library's torch side does not know
        raise ModelError(f"{path} is not a whole safetensors file of usual types: {error}.") from None
    except ValueError as error:
        raise ModelError(
            f"{path} is damaged, or no plain state dict ({error}). A pickled module can execute code and is not "
            "loaded; save tensors alone: torch.save(model.state_dict(), path), or safetensors."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(
            f"{path} holds {type(state).__name__}, not a state dict of tensors; save model.state_dict() alone."
        )
    if not all(isinstance(name, str) for name in state):
        raise ModelError(f"{path} has tensors whose names are no text; save model.state_dict() alone.")
    return dict(state)


def frozen(network: nn.Module) -> nn.Module:
    """The network in eval mode, its parameters without gradient."""
    return network.eval().requires_grad_(False)


def device_of(network: nn.Module) -> torch.device:
    """Device of the network's weights; the CPU if it has none."""
    return next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))


@contextlib.contextmanager
def last_features(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds, after each call of the network, the inputs of its last linear layer, if it has one."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    seen: list[Tensor] = []
    handles = [layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))] if layers else []
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def features(network: nn.Module, images: Tensor) -> Tensor | None:
    """Inputs (B, D) of the network's last linear layer, or None where there are none, one row per image."""
    with last_features(network) as seen, torch.no_grad():
        network(images)
    return seen[-1].flatten(1) if seen and len(seen[-1]) == len(images) else None
