"""Answers that somebody recorded: `Recorded('answers.npz')`."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undistill.core.errors import VictimError
from undistill.core.files import sha256
from undistill.core.tensors import LARGEST, read_arrays
from undistill.data.source import ResolvedPath
from undistill.data.split import Samples
from undistill.victims.black_box import Ask, BlackBox, Outputs
from undistill.victims.endpoint import image_keys, keys_of

Arrays = Mapping[str, NDArray[Any]]
HASH = 64  # hexadecimal digits


class Recorded(BlackBox):
    """An `.npz` of answers to images that a model gave before. Nobody is asked, and no other image is answered.

    It holds `images` (N, H, W), (N, H, W, C) or (N, C, H, W) in uint8, or `hashes` (N,), the SHA-256 of each image's
    pixels as (C, H, W) in uint8, in hexadecimal digits. Beside them lie `probabilities` (N, K) or `logits` (N, K);
    or `labels` (N,); or `probabilities` (N, k) with `classes` (N, k), the highest k of each.
    """

    any_image: ClassVar[bool] = False

    unnamed: ClassVar[str] = "path"
    path: ResolvedPath

    def refers(self) -> dict[str, str]:
        if not Path(self.path).is_file():
            raise VictimError(f"There is no file {self.path}.")
        return {self.path: sha256(Path(self.path), LARGEST)}

    def connect(self, shape: tuple[int, int, int], classes: tuple[str, ...], lost: Callable[[int], None]) -> Ask:
        rows = self.rows()
        outputs = _outputs(_read(self.path), len(self._keys()), Path(self.path).name)

        def ask(images: Tensor) -> Outputs:
            keys = image_keys(images)
            lacking = sum(key not in rows for key in keys)
            if lacking:
                raise VictimError(f"{self.path} lacks the answers to {lacking} of {len(keys)} images.")
            index = torch.tensor([rows[key] for key in keys])
            return Outputs(*(None if part is None else part[index] for part in outputs))

        return ask

    def rows(self) -> Mapping[str, int]:
        """The place of each recorded image, by the key of `image_keys`."""
        return {key: place for place, key in enumerate(self._keys())}

    def known(self, samples: Samples) -> Samples:
        rows = self.rows()
        return samples[torch.tensor([key in rows for key in keys_of(samples)], dtype=torch.bool).nonzero().flatten()]

    def _keys(self) -> tuple[str, ...]:
        return _keys(self.path, self.refers()[self.path])


def _read(path: str) -> Arrays:
    try:
        return read_arrays(Path(path), LARGEST)
    except (OSError, ValueError) as error:
        raise VictimError(f"{path} is not a readable .npz archive of plain arrays: {error}") from None


@cache
def _keys(path: str, digest: str) -> tuple[str, ...]:
    arrays, name = _read(path), Path(path).name
    if "hashes" in arrays:
        keys = [str(text.decode() if isinstance(text, bytes) else text).lower() for text in arrays["hashes"].flat]
        if wrong := next((key for key in keys if len(key) != HASH or set(key) - set("0123456789abcdef")), None):
            raise VictimError(f"{name}: '{wrong:.20}...' is no SHA-256 of an image's pixels in {HASH} digits.")
    elif "images" in arrays:
        images = arrays["images"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise VictimError(
                f"{name}: images are {images.dtype} of shape {images.shape}; they must be uint8, 0 to 255."
            )
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[3] in (1, 3):
            images = images.transpose(0, 3, 1, 2)
        keys = image_keys(torch.from_numpy(np.ascontiguousarray(images)).float() / 255)
    else:
        raise VictimError(f"{name} holds {', '.join(sorted(arrays)) or 'nothing'}; it needs images, or hashes of them.")
    return tuple(keys)


def _outputs(arrays: Arrays, count: int, name: str) -> Outputs:
    """All recorded answers; `VictimError` where they are not one for each of `count` images."""
    values = next((arrays[kind] for kind in ("probabilities", "logits") if kind in arrays), None)
    classes = arrays.get("labels") if values is None else arrays.get("classes")
    if values is not None and classes is not None and classes.shape != values.shape:
        classes = None  # names of classes, say
    if values is None and classes is None:
        raise VictimError(f"{name} holds no answers; it needs probabilities, logits or labels.")
    for part, kinds, dimensions in ((values, "fiu", 2), (classes, "iu", 1 if values is None else 2)):
        if part is None:
            continue
        if part.ndim != dimensions or part.dtype.kind not in kinds:
            raise VictimError(
                f"{name} holds answers in {part.dtype} of shape {part.shape}; see 'undistill list victims'."
            )
        if len(part) != count:
            raise VictimError(f"{name} holds {count} images and {len(part)} answers; there must be one for each.")
    return Outputs(
        None if values is None else torch.from_numpy(values.astype(np.float64)),
        None if classes is None else torch.from_numpy(classes.astype(np.int64)).reshape(count, -1),
    )
