"""Networks of the timm library, as `timm:NAME`."""

import importlib
from difflib import get_close_matches
from typing import Any

from torch import nn

from undistill.core.errors import ModelError
from undistill.core.spec import split_call
from undistill.models.adapter import Adapter
from undistill.models.model import Model
from undistill.models.trial import Shape


class Timm(Model):
    """`timm:NAME`, untrained, with its own normalisation; needs `pip install undistill[timm]`.

    `timm:NAME(img_size=32)` passes arguments of timm's own.
    """

    name: str

    def __str__(self) -> str:
        return f"timm:{self.name}"

    __repr__ = __str__

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        timm = _timm()
        name, _, arguments = self.name.partition("(")
        if not timm.is_model(name):
            near = get_close_matches(name, timm.list_models(), n=3) or timm.list_models()[:3]
            raise ModelError(f"timm has no network '{name}'; {', '.join(near)} ... (timm.list_models() names all).")
        given = split_call(f"{type(self).__name__}({arguments}")[2] if arguments else {}
        network = timm.create_model(name, **{"num_classes": num_classes, "in_chans": shape[0]} | given)
        return _adapter(network.pretrained_cfg, shape[0]).wrap(network, shape[0], num_classes)


def _adapter(config: dict[str, Any], channels: int) -> Adapter:
    """The normalisation for which the network was designed; grey images take the mean over colours."""
    mean, std = (tuple(config.get(name) or (0.5, 0.5, 0.5)) for name in ("mean", "std"))
    if channels != len(mean):
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    return Adapter(mean=mean, std=std)


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(f"timm cannot be imported ({error}): pip install 'undistill[timm]'.") from None
    except RuntimeError as error:  # torchvision for CUDA beside a torch for CPUs
        if "torchvision" not in str(error):
            raise
        raise ModelError(
            f"timm cannot be imported ({error}); torch and the torchvision that timm needs are of different builds. "
            "Install both from the same index."
        ) from error
