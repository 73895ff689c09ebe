"""Pictures of people: read as every viewer shows them, and laid into one shape."""

import codecs
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from undistill.core.errors import DataError, FileError, legible, refused
from undistill.core.files import GIB, open_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Formats that are read. Other readers of Pillow start programs (EPS), or are hardly maintained."""
LARGEST = GIB  # of one file
LARGEST_SHEET = 2**24  # pixels
MAX_PIXELS = 89_478_485  # Pillow's own limit, a quarter of a GiB in colour
_ONE_LIMIT = threading.Lock()  # the limit is one for all threads of the process
GREY = {"1", "L", "LA"}
COLOUR = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"}
PICTURES = re.compile(
    r"\.(a?png|jpe?g?|jfif|jp2|j2k|jxl|webp|bmp|dib|gif|tiff?|avif|hei[cf]|svg|eps|psd|ico|tga|p[bgnp]m|dng|nef|cr2"
    r"|arw|raw)",
    re.IGNORECASE,
)
"""Suffixes of pictures, read here or not: such a file is never passed over."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Turns that bring a picture upright, by its EXIF orientation."""
SIDEWAYS = (5, 6, 7, 8)

Shaping = Literal["squash", "crop", "pad"]


class TooManyPixels(DataError):
    """A picture that is larger than its reader allows, which is seen before anything of it is decoded."""

    def __init__(self, message: str, pixels: int = 0) -> None:
        super().__init__(message)
        self.pixels = pixels


@dataclass(frozen=True)
class Reading:
    """How pictures are read: what is done to those of another shape, and what lies behind transparent ones."""

    shaping: Shaping = "squash"
    background: str = "white"
    max_pixels: int = MAX_PIXELS

    @property
    def is_grey(self) -> bool:
        """Whether a transparent grey picture stays grey."""
        return len(set(ImageColor.getrgb(self.background)[:3])) == 1


class Header(NamedTuple):
    """Facts of a picture that need no decoding."""

    is_grey: bool
    is_transparent: bool
    size: tuple[int, int]
    """Width and height as a viewer shows them."""


PLAIN = Reading()


def read_header(file: Path, reading: Reading = PLAIN) -> Header:
    """`DataError` if it is no image that can be used."""
    with _readable(file, reading) as picture:
        width, height = picture.size
        size = (height, width) if _orientation(picture) in SIDEWAYS else (width, height)
        return Header(picture.mode in GREY, picture.has_transparency_data, size)


def read_picture(file: Path, channels: int, size: tuple[int, int], reading: Reading = PLAIN) -> Tensor:
    """uint8 (C, H, W) of `size` (width, height); `DataError` if it is no readable image."""
    with _readable(file, reading) as opened:
        return _pixels(opened, channels, size, reading)


def decode_picture(content: bytes, channels: int, size: tuple[int, int], reading: Reading = PLAIN) -> Tensor:
    """The same of an encoded picture that lies in memory; `TooManyPixels` if it is larger than `reading` allows."""
    try:
        with _checked(io.BytesIO(content), "The picture", reading) as opened:
            return _pixels(opened, channels, size, reading)
    except UnidentifiedImageError:
        raise DataError(f"The picture is no readable image; {', '.join(FORMATS)} are.") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"The picture is not a readable image ({legible(str(error))[:200]}).") from None


def count_pixels(content: bytes) -> int:
    """Pixels of an encoded picture, of which nothing is decoded; `DataError` if it is none."""
    try:
        with _open(io.BytesIO(content)) as opened:
            return opened.width * opened.height
    except UnidentifiedImageError:
        raise DataError(f"The picture is no readable image; {', '.join(FORMATS)} are.") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"The picture is not a readable image ({legible(str(error))[:200]}).") from None


def _pixels(opened: Image.Image, channels: int, size: tuple[int, int], reading: Reading) -> Tensor:
    upright = TURNS.get(_orientation(opened))
    picture = opaque(opened, reading.background).convert("L" if channels == 1 else "RGB")
    if upright is not None:
        picture = picture.transpose(upright)
    if picture.size != size:
        picture = _shaped(picture, size, reading)
    pixels = torch.from_numpy(np.array(picture)).reshape(size[1], size[0], -1)
    return pixels.permute(2, 0, 1).contiguous()


def _shaped(picture: Image.Image, size: tuple[int, int], reading: Reading) -> Image.Image:
    bilinear = Image.Resampling.BILINEAR
    if reading.shaping == "crop":
        return ImageOps.fit(picture, size, bilinear)
    if reading.shaping == "pad":
        return ImageOps.pad(picture, size, bilinear, color=reading.background)
    return picture.resize(size, bilinear)


def opaque(picture: Image.Image, background: str) -> Image.Image:
    """Grey or in colour, without transparency: what shines through is the background."""
    if not picture.has_transparency_data:
        return picture.convert("L" if picture.mode in GREY else "RGB")
    ground = Image.new("RGBA", picture.size, background)
    ground.alpha_composite(picture.convert("RGBA"))
    return ground.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or it cannot be read."""
    if picture.format == "TIFF":  # which Pillow turns by itself
        return 1
    with suppress(Exception):  # Pillow raises many kinds for EXIF that is damaged, which viewers overlook
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def read_sheet(file: Path) -> NDArray[np.uint8]:
    """The pixels of a picture as it is, (H, W) grey or (H, W, 3) colour; `DataError` if it is no readable one."""
    with _readable(file, PLAIN) as picture:
        if picture.width * picture.height > LARGEST_SHEET:
            raise DataError(f"{file} has more than {LARGEST_SHEET:,} pixels, and is no sheet of small images.")
        return np.array(picture.convert("L" if picture.mode in GREY else "RGB"))


def is_beside(file: Path) -> bool:
    """Whether `file` is one of those that lie beside pictures: a text, or what a file manager writes (Thumbs.db)."""
    if PICTURES.fullmatch(file.suffix):
        return False
    if file.suffix.casefold() in (".db", ".ini"):
        return True
    with open_regular(file, LARGEST) as content:
        head = content.read(4096)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


@contextmanager
def _readable(file: Path, reading: Reading) -> Iterator[Image.Image]:
    try:
        with open_regular(file, LARGEST) as content, _checked(content, str(file), reading) as opened:
            yield opened
    except TooManyPixels as error:
        raise TooManyPixels(
            f"{error}; make it smaller, or allow it: Folder(path=..., max_pixels={error.pixels})."
        ) from None
    except UnidentifiedImageError:
        raise DataError(_unidentified(file)) from None
    except (DataError, FileError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        if refused(error):
            raise DataError(f"{file} cannot be read: {error.strerror}.") from None
        raise DataError(f"{file} is not a readable image ({error}); repair or remove it.") from None


@contextmanager
def _checked(content: IO[bytes], name: str, reading: Reading) -> Iterator[Image.Image]:
    """A picture of which nothing is decoded yet, and which is none too large for that."""
    with _open(content) as opened:
        if opened.width * opened.height > reading.max_pixels:
            size = f"{opened.width:,} x {opened.height:,} pixels"
            raise TooManyPixels(f"{name} has {size}, more than {reading.max_pixels:,}", opened.width * opened.height)
        if opened.mode not in GREY | COLOUR:
            raise DataError(f"{name} has mode {opened.mode}; convert it to 8-bit grey or colour.")
        yield opened


def _open(content: IO[bytes]) -> Image.Image:
    """Without Pillow's own limit of pixels, which nobody could raise for one folder; nothing is decoded yet."""
    with _ONE_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(content, formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _unidentified(file: Path) -> str:
    with open_regular(file, LARGEST) as content:
        if content.read(40).startswith(b"version https://git-lfs"):
            return f"{file} is a Git LFS pointer and not the picture itself; fetch it with 'git lfs pull'."
    return f"{file} is no readable image; {', '.join(FORMATS)} are. Convert or remove it."


@cache
def _formats() -> list[str]:
    """The formats among `FORMATS` that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
