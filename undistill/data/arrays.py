"""Images that were given as objects, in Python: kept in a file beside the run, from which later processes read them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from undistill.core.errors import DataError
from undistill.core.files import write_atomically
from undistill.core.identity import fingerprint
from undistill.data.npz import Npz
from undistill.data.pictures import opaque
from undistill.data.source import Source

Arrays = Mapping[str, Any]
Images = str | os.PathLike[str] | Source | Arrays | tuple[Any, Any] | Dataset[Any]
"""A source or its text, arrays by the names that an .npz has, (images, labels), or a torch Dataset of such pairs."""
Pixels = NDArray[np.uint8]

TWICE = 20  # images that are read a second time, to notice random transforms
PARTS = ("images", "labels", "x_train", "y_train", "x_val", "y_val", "x_test", "y_test", "classes")


def stored(data: Images, out: str | Path) -> Source:
    """The source of `data`. Images that are no source yet are kept beside the run folder `out`."""
    if isinstance(data, str | os.PathLike | Source):
        return Source.from_user(data if isinstance(data, Source) else os.fspath(data))
    if isinstance(data, Mapping):
        arrays = {name: _array(value) for name, value in data.items()}
        if unknown := sorted(arrays.keys() - set(PARTS)):
            raise DataError(f"The arrays are called {', '.join(map(str, unknown))}; they must be {', '.join(PARTS)}.")
    elif isinstance(data, tuple):
        images, labels = data
        arrays = {"images": _array(images), "labels": _array(labels)}
    else:
        arrays = _read_all(data)
    arrays = {name: _levels(name, value) for name, value in arrays.items()}
    digest = fingerprint(*((name, str(value.shape), value.tobytes().hex()) for name, value in sorted(arrays.items())))
    out = Path(out)
    path = out.with_name(f"{out.name}-data-{digest[:10]}.npz")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        named: Mapping[str, Any] = arrays
        write_atomically(path, lambda file: np.savez(file, **named))
    return Npz(path=str(path), max_bytes=max(Npz.model_fields["max_bytes"].default, _size(arrays)))


def _size(arrays: Arrays) -> int:
    return sum(value.nbytes + 1024 for value in arrays.values())


def _levels(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Images in 256 levels, from 0 to 255; other arrays as they are."""
    if not name.startswith(("x", "images")) or values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "fiu":
        raise DataError(f"{name} is of type {values.dtype}; images are numbers: uint8, or from 0 to 1.")
    if values.size and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= _largest(values)):
        raise DataError(
            f"{name} runs from {values.min():g} to {values.max():g}; images are whole numbers from 0 to 255, or others "
            "from 0 to 1. If they are normalised, leave that out, and name it: "
            "preprocess=Adapter(mean=..., std=...), or preprocess='imagenet'."
        )
    scale = 1 if values.dtype.kind in "iu" else 255
    return (values * scale).round().astype(np.uint8)


def _largest(values: NDArray[Any]) -> int:
    return 255 if values.dtype.kind in "iu" else 1


def _read_all(data: Any) -> dict[str, NDArray[Any]]:
    """All images and labels of a torch Dataset."""
    name = type(data).__name__
    try:
        pairs = [_pair(*data[number]) for number in range(len(data))]
        if not pairs:
            raise ValueError("it is empty")
        again = [_pair(*data[number])[0] for number in range(min(len(data), TWICE))]
    except Exception as error:
        raise DataError(
            f"{name} cannot be read as a Dataset of (image, label) with a length: {type(error).__name__}: {error}. "
            "Labels are whole numbers. Arrays are taken as (images, labels)."
        ) from error
    if not all(np.array_equal(pixels, image) for image, (pixels, _) in zip(again, pairs, strict=False)):
        raise DataError(
            f"{name} gives its images differently each time; leave random transforms out. Images are changed in "
            "training by the recipe: recipe.views."
        )
    shapes = {pixels.shape for pixels, _ in pairs}
    if len(shapes) > 1:
        raise DataError(
            f"{name} gives images of the shapes {sorted(shapes)[:4]}; they must be of one. Resize and convert them in "
            "its transform, or name the folder in which they lie."
        )
    labels = np.asarray([label for _, label in pairs], dtype=np.int64)
    found = {"images": np.stack([pixels for pixels, _ in pairs]), "labels": labels}
    names = getattr(data, "classes", None)
    if isinstance(names, Sequence) and len(names) > max(labels, default=0):
        found["classes"] = np.asarray([str(name) for name in names])
    return found


def _pair(image: Any, label: Any) -> tuple[NDArray[Any], int]:
    return _pixels(image), int(label)


def _pixels(image: Any) -> NDArray[Any]:
    """(C, H, W) of a tensor; (H, W) or (H, W, C) of anything else."""
    if isinstance(image, Image.Image):
        return np.asarray(opaque(image, "white"))
    return _array(image)


def _array(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
