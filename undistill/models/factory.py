"""The user's own network."""

import inspect
from copy import deepcopy

from torch import nn

from undistill.core.code import load_code
from undistill.core.errors import ModelError
from undistill.core.spec import split_call
from undistill.models.model import Model
from undistill.models.trial import Shape, require_copyable


class Factory(Model):
    """`path/to/file.py:factory` or `package.module:factory`, with `(name=value, ...)` for its own arguments.

    Called with those of `num_classes`, `in_channels` and `image_size` (height, width) that it takes.
    """

    call: str

    def __str__(self) -> str:
        return self.call

    __repr__ = __str__

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        origin, name, arguments = split_call(self.call)
        make = load_code(f"{origin}:{name}")
        known = {"num_classes": num_classes, "in_channels": shape[0], "image_size": shape[1:]}
        try:
            taken = inspect.signature(make).parameters
            # a copy, so that a part which the user's module keeps is not shared by two networks
            network: nn.Module = make(**{key: known[key] for key in known if key in taken} | arguments)
            if isinstance(network, nn.Module):
                require_copyable(network, self.call)
            return deepcopy(network)
        except ModelError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelError(f"{self.call} raised {type(error).__name__}: {error}") from error
