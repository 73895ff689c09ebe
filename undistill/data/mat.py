"""MATLAB 5 files, as far as data sets of bytes need them.

Only arrays of bytes are read, and every number in the file is checked before it is used; scipy's reader, given a file
with one changed byte, may crash the process. Format: "MAT-File Format", MathWorks, "Level 5".
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from undistill.core.files import open_regular

HEADER = 128
INT8, UINT8, INT32, UINT32, MATRIX, COMPRESSED = 1, 2, 5, 6, 14, 15
CLASSES = {9, 6}  # uint8, and double, whose whole numbers below 256 MATLAB stores as bytes, too


def read_mat(path: Path, largest: int) -> dict[str, NDArray[np.uint8]]:
    """The arrays of bytes in a MATLAB 5 file, by name; `ValueError` for any other content.

    Neither the file nor what it unpacks to may have more than `largest` bytes.
    """
    with open_regular(path, largest) as file:
        content = file.read(largest)
    if len(content) < HEADER or content[124:128] != b"\x00\x01IM":
        raise ValueError("no little-endian MATLAB 5 file")
    arrays = {}
    for kind, data in _elements(content[HEADER:]):
        if kind == COMPRESSED:
            (kind, data), *rest = _elements(_unpacked(data, largest))
            if rest:
                raise ValueError("several arrays packed in one")
        if kind != MATRIX:
            raise ValueError(f"an element of the kind {kind}, where an array is expected")
        name, array = _matrix(data)
        arrays[name] = array
    return arrays


def _unpacked(data: bytes, largest: int) -> bytes:
    stream = zlib.decompressobj()
    unpacked = stream.decompress(data, largest)
    if not stream.eof:
        raise ValueError(f"a packed array that is cut off, or larger than {largest:,} bytes")
    return unpacked


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each element in turn."""
    view, at = memoryview(data), 0
    while at < len(view):
        kind, size = struct.unpack_from("<II", view, at)
        if kind >> 16:  # a small one: kind and size share four bytes, the content fills the other four
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError("a small element that is none")
        else:
            start = at + 8
            end = start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > len(view):
            raise ValueError(f"an element of {size:,} bytes, of which the end is missing")
        yield kind, bytes(view[start : start + size])
        at = end


def _matrix(data: bytes) -> tuple[str, NDArray[np.uint8]]:
    """Name and values of an array, in the order of its dimensions."""
    parts = [*_elements(data)]
    if [kind for kind, _ in parts] != [UINT32, INT32, INT8, UINT8]:
        raise ValueError(f"an array with parts of the kinds {[kind for kind, _ in parts][:10]}, not one of bytes")
    flags, dimensions, name, values = (content for _, content in parts)
    if len(flags) != 8 or flags[0] not in CLASSES or flags[1] & 0b1000:
        raise ValueError("an array that is not of bytes")
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    array = np.frombuffer(values, np.uint8)
    if not 2 <= len(shape) <= 8 or min(shape) < 0:
        raise ValueError(f"an array of the shape {shape[:10]}")
    return name.decode("ascii"), array.reshape(shape, order="F")
