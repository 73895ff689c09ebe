"""Images and labels in one NumPy archive."""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from undistill.core.errors import DataError
from undistill.core.tensors import LARGEST, read_arrays
from undistill.data.source import ResolvedPath, Source
from undistill.data.split import Parts, Samples


class Npz(Source):
    """An `.npz` with `images` and `labels`, or `x_train`, `y_train`, `x_test`, `y_test` (and `x_val`, `y_val`).

    Images are uint8, (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3; labels are whole
    numbers from 0, (N,). An optional `classes` array names them.
    """

    quiet = ("max_bytes",)

    path: ResolvedPath
    max_bytes: int = Field(LARGEST, ge=1)
    """Largest size of all arrays together; an archive of a few megabytes can unpack to more than fits into memory."""

    @property
    def title(self) -> str:
        return Path(self.path).stem

    def read(self) -> Parts:
        try:
            arrays = read_arrays(Path(self.path), self.max_bytes)
        except FileNotFoundError:
            raise DataError(f"There is no file {self.path}.") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} is not a readable .npz archive of plain arrays: {error}") from None
        if {"images", "labels"} <= arrays.keys():
            pool, validation, test = self._samples(arrays, "images", "labels"), None, None
        elif {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
            pool = self._samples(arrays, "x_train", "y_train")
            test = self._samples(arrays, "x_test", "y_test")
            supplied = {"x_val", "y_val"} <= arrays.keys()
            validation = self._samples(arrays, "x_val", "y_val") if supplied else None
        else:
            raise DataError(
                f"{self.path} holds {sorted(arrays) or 'nothing'}; it needs images and labels, "
                "or x_train, y_train, x_test and y_test."
            )
        if int(pool.labels.max()) >= len(pool):
            raise DataError(
                f"{Path(self.path).name}: label {int(pool.labels.max())} is out of range; labels count the classes "
                f"from 0, and there are only {len(pool)} images."
            )
        names = arrays.get("classes", np.arange(int(pool.labels.max()) + 1))
        if names.ndim != 1:
            raise DataError(
                f"{Path(self.path).name}: classes has shape {names.shape}; it must list one name per class."
            )
        if len(names) > len(pool):
            raise DataError(f"{Path(self.path).name}: {len(names):,} classes, and only {len(pool):,} images.")
        return Parts(pool, [str(name) for name in names], validation, test)

    def _samples(self, arrays: dict[str, np.ndarray], x: str, y: str) -> Samples:
        images, labels = arrays[x], arrays[y]
        where = Path(self.path).name
        if images.dtype != np.uint8:
            raise DataError(f"{where}: {x} is {images.dtype}; images must be uint8, 0 to 255.")
        if images.ndim == 3:
            images = images[:, None]
        elif images.ndim == 4 and images.shape[3] in (1, 3):
            images = images.transpose(0, 3, 1, 2)
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise DataError(
                f"{where}: {x} has shape {arrays[x].shape}; images must be (N, H, W), (N, H, W, C) "
                "or (N, C, H, W), with 1 or 3 channels."
            )
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise DataError(
                f"{where}: {y} is {labels.dtype} of shape {labels.shape}; labels must be whole numbers "
                f"of shape ({len(images)},), one for each image."
            )
        if int(labels.max()) > np.iinfo(np.int32).max:
            raise DataError(f"{where}: {y} holds {labels.max()}; labels count the classes from 0.")
        return Samples(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
