"""Images that stay in their files until they are needed, for data larger than memory."""

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from undistill.core.errors import DataError
from undistill.core.files import inside, sha256
from undistill.data.pictures import LARGEST, PLAIN, Reading, read_picture

T = TypeVar("T")
READERS = 8  # threads, which the lock of Python bounds in any case
AHEAD = 2**30  # bytes of images that are held before they are needed

SERVICE = {"@eadir", "__macosx", "$recycle.bin", "#recycle", "lost+found", "system volume information"}
"""Folders that systems put among those of people."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """N images of one shape; `images[index]` reads those of `index` as uint8 (B, C, H, W)."""

    files: Sequence[Path]
    shape: tuple[int, int, int, int]
    """N, C, H, W."""
    reading: Reading = PLAIN
    known: dict[Path, bytes] = field(default_factory=dict)
    """SHA-256 of the files that were read whole before."""

    @classmethod
    def join(cls, parts: "Sequence[ImageFiles]") -> "ImageFiles":
        """The images of several parts that are read in the same way, in order."""
        files = [file for part in parts for file in part.files]
        known = {file: sha for part in parts for file, sha in part.known.items()}
        return replace(parts[0], files=files, shape=(len(files), *parts[0].shape[1:]), known=known)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Tensor:
        _, channels, height, width = self.shape
        size = width, height
        pictures = [read_picture(self.files[int(number)], channels, size, self.reading) for number in index]
        return torch.stack(pictures) if pictures else torch.empty(0, channels, height, width, dtype=torch.uint8)

    def subset(self, index: Tensor) -> "ImageFiles":
        files = [self.files[int(number)] for number in index]
        return replace(self, files=files, shape=(len(index), *self.shape[1:]))

    def hashes(self) -> list[bytes]:
        """SHA-256 of each file."""
        for file in self.files:
            if file not in self.known:
                self.known[file] = bytes.fromhex(sha256(file, LARGEST))
        return [self.known[file] for file in self.files]

    def digest(self) -> bytes:
        """SHA-256 over what the files hold and the shape to which it is read."""
        return hashlib.sha256(repr(self.shape).encode() + b"".join(self.hashes())).digest()


def entries(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    """Entries of `folder` by name, without hidden ones and those of the system.

    Raises `DataError` for what would be read from elsewhere, or never end: a link to a folder, a link out of `root`, a
    dead link, a FIFO or device.
    """
    with os.scandir(folder) as found:
        seen = [entry for entry in found if not entry.name.startswith(".") and entry.name.casefold() not in SERVICE]
    visible = sorted(seen, key=lambda entry: entry.name)
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
    """`fetch` of each part in turn; where images lie in files, threads fetch some parts ahead.

    Threads, since decoding releases Python's lock, and processes would send images through /dev/shm, of which
    containers have little.
    """
    if isinstance(images, Tensor):
        yield from map(fetch, parts)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    largest = max(map(len, parts), default=1) * math.prod(images.shape[1:])  # bytes of a part
    threads = max(min(cores, READERS, AHEAD // largest), 1)
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for part in parts:
                ahead.append(pool.submit(fetch, part))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
