"""A network that was given as an object, in Python."""

import hashlib
import inspect
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import CodeType

import torch
from torch import Tensor, nn

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
    form: list[tuple[object, ...]] = [
        (name, str(value.dtype), tuple(value.shape)) for name, value in network.state_dict().items()
    ]
    form += [(name, *held) for name, module in network.named_modules() for held in _held(module)]
    code = {_code(kind) for kind in {type(module) for module in network.modules()}}
    return fingerprint(repr(network), form, sorted(filter(None, code)))[:20]


def _held(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Plain values, and hashes of tensors, that a module holds outside of its state dict, by name."""
    stored = module.state_dict().keys()
    for name, value in sorted((vars(module) | module._buffers).items()):
        if name in stored or name == "training" or name.startswith("__"):
            continue
        if isinstance(value, Tensor):
            yield name, hashlib.sha256(bytes_of(value)).hexdigest()
        elif all(isinstance(one, int | float | str) for one in (value if isinstance(value, tuple | list) else [value])):
            yield name, repr(value)


def _code(kind: type) -> str | None:
    """Hash of the code of a class, or of its whole module; None for torch's own."""
    if kind.__module__.startswith("torch."):
        return None
    if kind.__module__ == "__main__":  # a script says other things too, and a notebook has no file
        return fingerprint([list(_compiled(one.__code__)) for one in vars(kind).values() if hasattr(one, "__code__")])
    return program_sha256(Path(inspect.getfile(kind)))


def _compiled(code: CodeType) -> Iterator[str]:
    yield from (code.co_code.hex(), *code.co_names)
    for value in code.co_consts:
        yield from _compiled(value) if isinstance(value, CodeType) else (repr(value),)
