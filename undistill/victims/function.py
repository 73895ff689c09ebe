"""A function of the user's own: `Function('predict.py:predict')`."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from undistill.core.code import code_sha256, load_code
from undistill.core.errors import VictimError
from undistill.victims.black_box import Ask, BlackBox, Outputs


class Function(BlackBox):
    """Calls `predict(images)` with float32 images (B, C, H, W) in [0, 1], and gets numbers (B, K) or labels (B,).

    Both are arrays of NumPy, or anything that it makes one of.
    """

    unnamed: ClassVar[str] = "call"
    transport = ("size",)
    call: str = Field(max_length=4096)
    """Where the function is: `file.py:name` or `module:name`."""
    size: int = Field(512, ge=1, le=65_536)
    """The most images of one call."""

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return self.size

    def refers(self) -> dict[str, str]:
        return {self.call: code_sha256(self.call)}

    @property
    def code(self) -> str:
        return self.call

    def connect(self, shape: tuple[int, int, int], classes: tuple[str, ...], lost: Callable[[int], None]) -> Ask:
        predict = load_code(self.call)
        if not callable(predict):
            raise VictimError(f"{self.call} cannot be called; name a function of images.")

        def ask(images: Tensor) -> Outputs:
            try:
                found = predict(images.numpy())
            except Exception as error:
                raise VictimError(f"{self.call} failed: {type(error).__name__}: {error}") from error
            return outputs_of(found.detach().cpu() if isinstance(found, Tensor) else found)

        return ask


def outputs_of(found: Any) -> Outputs:
    """Numbers (B, K), or labels (B,), as outputs."""
    try:
        array: NDArray[Any] = np.asarray(found)
        if array.dtype.kind in "iu" and (array.ndim == 1 or array.shape[1:] == (1,)):
            return Outputs(None, torch.from_numpy(array.astype(np.int64)).reshape(-1, 1))
        return Outputs(torch.from_numpy(array.astype(np.float64)))
    except (TypeError, ValueError, OverflowError):
        raise VictimError(
            f"The black box answers {type(found).__name__}; numbers (images, classes) or labels (images,) are needed."
        ) from None
