"""A network that was given as an object, in Python."""

import hashlib
import inspect
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import CodeType

import torch
from torch import nn

from undistill.core.errors import ModelError
from undistill.core.identity import fingerprint, program_sha256
from undistill.models.model import Model
from undistill.models.trial import Shape, require_copyable
from undistill.models.weights import bytes_of

_given: dict[str, nn.Module] = {}


class Given(Model):
    """An `nn.Module` of this process; a later one has to be given it again."""

    offered = False

    name: str
    structure: str
    """Hash of its modules, of the form of its weights, and of its code: of everything but its weights."""

    @classmethod
    def of(cls, network: nn.Module) -> "Given":
        """Keep a copy of `network` for as long as this process lives."""
        require_copyable(network, type(network).__name__)
        spec = cls(name=type(network).__name__, structure=structure_of(network))
        _given[spec.structure] = deepcopy(network).cpu()
        return spec

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        """A copy with new initial weights, drawn from torch's generator as its layers draw theirs."""
        if self.structure not in _given:
            raise ModelError(
                f"The network {self.name} was given as an object, which ends with its process. Give it again, in "
                "Python: model=network. For the command line and for worker processes adopt it by a function that "
                "makes it: --model file.py:function."
            )
        network = deepcopy(_given[self.structure])
        for module in network.modules():
            initialise(module)
        return network


def initialise(module: nn.Module) -> None:
    """New weights for a module's own parameters: its own way if it has one, else those usual for their form."""
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        return
    with torch.no_grad():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                weight.normal_(std=0.02)  # tokens, positions
            else:
                weight.fill_(0 if "bias" in name else 1)


def structure_of(network: nn.Module) -> str:
    """The first digits of a hash of everything but the network's weights."""
    if any(map(nn.parameter.is_lazy, network.parameters())):
        raise ModelError(f"{type(network).__name__} has layers without sizes yet; call it once on an image.")
    form: list[tuple[object, ...]] = [
        (name, str(value.dtype), tuple(value.shape)) for name, value in network.state_dict().items()
    ]
    form += [(name, *held) for name, module in network.named_modules() for held in _held(module)]
    code = {digest for module in network.modules() for digest in _code(type(module))}
    return fingerprint(repr(network), form, sorted(code))[:20]


def _held(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Plain values and functions that a module holds, and hashes of buffers that are in no state dict, by name."""
    stored = module.state_dict().keys()
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in stored:
            yield name, hashlib.sha256(bytes_of(buffer)).hexdigest()
    for name, value in sorted(vars(module).items()):
        if name != "training" and not name.startswith("_") and (text := _plain(value)):
            yield name, text


def _plain(value: object) -> str:
    """A text that is the same in every process, for numbers, texts, functions, and what holds them; else empty."""
    if isinstance(value, int | float | str | bytes | None):
        return repr(value)
    if isinstance(value, dict):
        return str(sorted((repr(key), _plain(held)) for key, held in value.items()))
    if isinstance(value, tuple | list | set | frozenset):
        texts = list(map(_plain, value))
        return str(sorted(texts) if isinstance(value, set | frozenset) else texts)
    if isinstance(value, CodeType):
        return str([value.co_code.hex(), value.co_names, _plain(value.co_consts)])
    if code := getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None):
        return _plain(code)
    return str(getattr(value, "__qualname__", ""))


def _code(kind: type) -> Iterator[str]:
    """Hashes of the code of a class and of those that it extends; torch's own are left out."""
    for one in kind.__mro__:
        if one is object or one.__module__.startswith("torch."):
            continue
        try:
            if one.__module__ == "__main__":  # a script says other things too, and a notebook has no file
                raise OSError
            yield program_sha256(Path(inspect.getfile(one)))
        except (TypeError, OSError):
            yield fingerprint([(name, _plain(value)) for name, value in vars(one).items() if callable(value)])
