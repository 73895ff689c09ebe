"""Weights of people: checkpoints as training code leaves them, read without executing anything."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from undistill.core.errors import ModelError, remark, unknown
from undistill.core.files import MIB, open_regular, read_bytes
from undistill.core.tensors import LARGEST, load_state

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
"""Keys under which checkpoints keep averaged weights. They are the ones that were measured, and so come first."""
KEYS = (*AVERAGED, "state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
COUNTER = "num_batches_tracked"
CONVERT = """Where you trust the file, write its tensors alone:
    held = torch.load({path!r}, weights_only=False)  # a module, or a dict that holds one or its state dict
    torch.save(held.state_dict() if hasattr(held, "state_dict") else held["state_dict"], "weights.pt")"""


class Match(NamedTuple):
    """Tensors of a file under the network's own names, and what the file has beside them."""

    state: dict[str, Tensor]
    prefix: str
    beside: list[str]


def load_weights(network: nn.Module, path: Path, key: str | None = None) -> None:
    """Load a safetensors file, or a checkpoint saved by torch. Pickled modules are refused unread.

    A checkpoint may keep its weights under `key`, or under a usual one (`state_dict`, `model`, `ema`, ...), and may
    name them with a prefix (`module.`, `_orig_mod.`, ...); both are said.

    Raises `ModelError` for weights of another architecture, and for those that the network cannot hold as they are:
    sparse, quantised, complex, without data, or not finite in the network's own precision.
    """
    fill(network, read_state(path, largest_weights(network), key), str(path))


def fill(network: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load tensors that were read from `origin`. See `load_weights`."""
    own = network.state_dict()
    match = _matched(state, own, _constants(network))
    if match is None:
        raise ModelError(f"{origin} holds the weights of another architecture: {_difference(state, own)}.")
    if match.prefix:
        remark(f"{origin}: the names of its tensors begin with '{match.prefix}', which is left out.")
    if match.beside:
        remark(f"{origin}: {len(match.beside)} tensors beside the network's are unused ({match.beside[0][:100]} ...).")
    fitting = {name: _fitting(value, own[name], f"{origin}: {name}") for name, value in match.state.items()}
    network.load_state_dict(own | fitting)


def largest_weights(network: nn.Module) -> int:
    """Bytes of a file with weights for `network`: in double precision, with optimiser and averages, and some more."""
    tensors = [value for value in network.state_dict().values() if isinstance(value, Tensor)]
    return 16 * sum(int(value.nbytes) for value in tensors) + 256 * MIB


def _constants(network: nn.Module) -> set[str]:
    """Names of tensors that a file may lack: counters of batch norm."""
    return {name for name in network.state_dict() if name.split(".")[-1] == COUNTER}


def _matched(state: Mapping[str, Tensor], own: Mapping[str, Tensor], optional: set[str]) -> Match | None:
    """The first way of reading the file's names by which it has all that the network needs, in the right shapes."""
    needed = own.keys() - optional
    for prefix, added in _prefixes(state, needed):
        found = {added + name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
        beside = [name for name in state if name not in found.values()]
        extra = [name for full, name in found.items() if full not in own and full != added + "n_averaged"]
        shaped = all(state[found[name]].shape == own[name].shape for name in own.keys() & found.keys())
        if needed <= found.keys() and shaped and not extra and (prefix or not beside):
            return Match({name: state[found[name]] for name in own.keys() & found.keys()}, prefix, beside)
    return None


def _prefixes(state: Mapping[str, Tensor], needed: set[str]) -> Iterator[tuple[str, str]]:
    """Beginnings of the names in a file, each with what the network's names begin with in its stead."""
    yield "", ""
    if not needed:
        return
    first = min(needed)
    for name in state:
        if name.endswith("." + first):
            yield name.removesuffix(first), ""
    parts = first.split(".")
    for count in range(1, len(parts)):
        added = ".".join(parts[:count]) + "."
        if all(name.startswith(added) for name in needed):
            yield "", added
            rest = first.removeprefix(added)
            yield from ((name.removesuffix(rest), added) for name in state if name.endswith("." + rest))


def _difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the network's is {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    return "; ".join(
        [
            *([f"missing {missing[0]} and {len(missing) - 1} more"] if missing else []),
            *([f"unexpected {extra[0][:100]} and {len(extra) - 1} more"] if extra else []),
            *sorted(shapes)[:1],
        ]
    )


def _fitting(value: Tensor, own: Tensor, name: str) -> Tensor:
    """`value` in the type of the network's own tensor; `ModelError` if that would be something else."""
    kinds = {"sparse": value.layout != torch.strided, "quantised": value.is_quantized, "without data": value.is_meta}
    kinds["complex"] = value.is_complex() and not own.is_complex()
    kinds[f"{value.dtype}, quantised or cut off"] = own.is_floating_point() and not value.is_floating_point()
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


def read_state(path: Path, largest: int = LARGEST, key: str | None = None) -> dict[str, Tensor]:
    """The tensors in a safetensors or torch file, by name; nothing in it is executed. See `load_weights`."""
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}.")
    with open_regular(path, largest) as file:
        head = file.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer and not the weights themselves; fetch them: git lfs pull.")
    content = _read_safetensors(path, largest) if _is_safetensors(path, head) else _read_torch(path)
    state = _weights_in(content, path, key)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(
            f"{path} holds {type(state).__name__}, not a state dict of tensors; save model.state_dict() alone."
        )
    if not all(isinstance(name, str) for name in state):
        raise ModelError(f"{path} has tensors whose names are no text; save model.state_dict() alone.")
    return dict(state)


def _is_safetensors(path: Path, head: bytes) -> bool:
    """By its content: JSON after eight bytes. By its suffix where that is neither."""
    known = head.startswith((b"PK", b"\x80"))  # a zip file, or a pickle
    return head[8:9] == b"{" or (path.suffix == ".safetensors" and not known)


def _read_safetensors(path: Path, largest: int) -> dict[str, Tensor]:
    try:
        return load(read_bytes(path, largest))
    except (SafetensorError, KeyError) as error:  # KeyError: a type that the library's torch side does not know
        raise ModelError(f"{path} is not a whole safetensors file of usual types: {error}.") from None


def _read_torch(path: Path) -> Any:
    try:
        return load_state(path, torch.device("cpu"))
    except ValueError as error:
        raise ModelError(
            f"{path} is damaged, or no plain state dict ({error}). A pickled module can execute code and is not "
            f"loaded. {CONVERT.format(path=str(path))}"
        ) from None


def _weights_in(content: Any, path: Path, key: str | None) -> Any:
    """The state dict in a checkpoint, which may hold several, and much else."""
    if not isinstance(content, dict):
        return content
    if key is not None:
        if key not in content:
            raise ModelError(unknown(f"key in {path}", key, map(str, content)))
        return content[key]
    held = [name for name in KEYS if _state_in(content.get(name)) is not None]
    if not held:
        return content
    others = f"; {', '.join(held[1:])} is there as well, see --key" if held[1:] else ""
    remark(f"{path}: the weights under '{held[0]}' are taken{others}.")
    return _state_in(content[held[0]])


def _state_in(held: Any, deepest: int = 2) -> Any:
    """A state dict, or the one that a dict holds under a usual key; None for anything else."""
    if not isinstance(held, dict) or not held or not deepest:
        return None
    if all(isinstance(value, Tensor) for value in held.values()):
        return held
    return next((found for name in KEYS if (found := _state_in(held.get(name), deepest - 1)) is not None), None)


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    weights = hashlib.sha256()
    for name, value in network.state_dict().items():
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(bytes_of(value))
    return weights.hexdigest()


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a tensor, for a hash."""
    raw: NDArray[np.uint8] = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw.data)
