"""Top answers as text, in which form a cell keeps them."""

import base64

import numpy as np
from numpy.typing import NDArray


def written(predictions: NDArray[np.int64], num_classes: int) -> str:
    """Top answers (N,) as text: base64 of one byte each, of two or four for more than 256 classes."""
    return base64.b64encode(predictions.astype(_width(num_classes)).tobytes()).decode()


def predicted(text: str, num_classes: int) -> NDArray[np.int64]:
    """The top answers (N,) that `written` made text of."""
    return np.frombuffer(base64.b64decode(text), _width(num_classes)).astype(np.int64)


def _width(num_classes: int) -> str:
    return "<u1" if num_classes <= 256 else "<u2" if num_classes <= 65_536 else "<u4"
