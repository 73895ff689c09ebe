"""A network that was given as an object, in Python."""

import inspect
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from undistill.core.errors import ModelError
from undistill.core.identity import fingerprint, program_sha256
from undistill.models.model import Model
from undistill.models.trial import Shape, require_copyable

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
        _given.setdefault(spec.structure, deepcopy(network).cpu())
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
    form = [(name, str(value.dtype), tuple(value.shape)) for name, value in network.state_dict().items()]
    code = {
        program_sha256(Path(file)) for kind in {type(module) for module in network.modules()} if (file := _file(kind))
    }
    return fingerprint(repr(network), form, sorted(code))[:20]


def _file(kind: type) -> str | None:
    """Where the code of a class lies; None for torch's own, and for a class that was typed into a notebook."""
    if kind.__module__.startswith("torch."):
        return None
    try:
        return inspect.getfile(kind)
    except (TypeError, OSError):
        return None
