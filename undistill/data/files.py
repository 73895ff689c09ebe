"""Images that stay in their files until they are needed, for data larger than memory."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from undistill.core.errors import DataError, FileError, UndistillError, refused
from undistill.core.files import GIB, inside, open_regular, sha256

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Formats that are read. Other readers of Pillow start programs (EPS), or are hardly maintained."""
LARGEST = GIB  # of one file
LARGEST_SHEET = 2**24  # pixels
GREY = {"1", "L", "LA"}
COLOUR = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"}


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """N images of one shape; `images[index]` reads those of `index` as uint8 (B, C, H, W)."""

    files: Sequence[Path]
    shape: tuple[int, int, int, int]
    """N, C, H, W."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Tensor:
        _, channels, height, width = self.shape
        pictures = [read_picture(self.files[int(number)], channels, (width, height)) for number in index]
        return torch.stack(pictures) if pictures else torch.empty(0, channels, height, width, dtype=torch.uint8)

    def subset(self, index: Tensor) -> "ImageFiles":
        return ImageFiles([self.files[int(number)] for number in index], (len(index), *self.shape[1:]))

    def digest(self) -> bytes:
        """SHA-256 over what the files hold and the shape to which it is read."""
        sha = hashlib.sha256(repr(self.shape).encode())
        for file in self.files:
            sha.update(bytes.fromhex(sha256(file, LARGEST)))
        return sha.digest()


def read_header(file: Path) -> tuple[str, tuple[int, int]]:
    """Mode and size (width, height), without decoding; `DataError` if it is no image that can be used."""
    with _readable(file) as picture:
        return picture.mode, picture.size


def read_picture(file: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """uint8 (C, H, W), resized to `size` (width, height) where it differs; `DataError` if it is no readable image."""
    with _readable(file) as opened:
        plain = opened.convert("L" if opened.mode in GREY else "RGB")
    picture = plain.convert("L" if channels == 1 else "RGB")
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).reshape(size[1], size[0], -1)
    return pixels.permute(2, 0, 1).contiguous()


def read_sheet(file: Path) -> NDArray[np.uint8]:
    """The pixels of a picture as it is, (H, W) grey or (H, W, 3) colour; `DataError` if it is no readable one."""
    with _readable(file) as picture:
        if picture.width * picture.height > LARGEST_SHEET:
            raise DataError(f"{file} has more than {LARGEST_SHEET:,} pixels, and is no sheet of small images.")
        return np.array(picture.convert("L" if picture.mode in GREY else "RGB"))


@contextmanager
def _readable(file: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_regular(file, LARGEST) as content, Image.open(content, formats=_formats()) as opened:
                if opened.mode not in GREY | COLOUR:
                    raise DataError(f"{file} has mode {opened.mode}; convert it to 8-bit grey or colour.")
                yield opened
    except UnidentifiedImageError:
        raise DataError(f"{file} is no readable image; {', '.join(FORMATS)} are. Convert or remove it.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{file} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller.") from None
    except (DataError, FileError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        if refused(error):
            raise DataError(f"{file} cannot be read: {error.strerror}.") from None
        raise DataError(f"{file} is not a readable image ({error}); repair or remove it.") from None


@cache
def _formats() -> list[str]:
    """The formats among `FORMATS` that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def entries(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    """Entries of `folder` by name, without hidden ones.

    Raises `DataError` for what would be read from elsewhere, or never end: a link to a folder, a link out of `root`, a
    dead link, a FIFO or device.
    """
    with os.scandir(folder) as found:
        visible = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_symlink():
            if not os.path.exists(entry.path) or entry.is_dir():
                what = "is a link to a folder" if entry.is_dir() else "is a link to nothing"
                raise DataError(f"{entry.path} {what}; put a copy of what is meant into its place, or remove it.")
            inside(root, os.path.relpath(entry.path, root))
        elif not (entry.is_dir() or entry.is_file()):
            raise DataError(f"{entry.path} is neither file nor folder; remove it.")
    return visible


def files_below(folder: Path, root: Path) -> list[Path]:
    """All files below `folder`, sorted, hidden ones aside; see `entries`."""
    found: list[Path] = []
    todo = [folder]
    while todo:
        for entry in entries(todo.pop(), root):
            (todo if entry.is_dir() else found).append(Path(entry.path))
    return sorted(found)


def fetched(images: Tensor | ImageFiles, fetch: Callable[[Tensor], T], parts: Sequence[Tensor]) -> Iterator[T]:
    """`fetch` of each part in turn; where images lie in files, worker processes fetch ahead."""
    if isinstance(images, Tensor):
        yield from map(fetch, parts)
        return
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(parts))
    loader = DataLoader(
        _Fetching(fetch),
        sampler=parts,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the caller's, who then drops out other units
    )
    for result in loader:
        if isinstance(result, UndistillError):
            raise result
        yield result


class _Fetching(Dataset[T | UndistillError]):
    """An error travels as a result, since DataLoader would wrap it into a traceback."""

    def __init__(self, fetch: Callable[[Tensor], T]) -> None:
        self.fetch = fetch

    def __getitem__(self, index: Tensor) -> T | UndistillError:
        try:
            return self.fetch(index)
        except UndistillError as error:
            return error
