"""Files that are whole or absent: written beside their name, flushed to the disk, then renamed."""

import hashlib
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from undistill import distributed

log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Of several processes that train together, the first alone writes."""
    if distributed.rank() > 0:
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that `write_json` wrote; None if absent, unreadable or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """One JSON object on each line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Nested plain containers and tensors, as `read_tensors` reads them."""

    def write(file: IO[bytes]) -> None:
        buffer = io.BytesIO()  # torch's own writer hides why the disk refused
        torch.save(state, buffer)
        file.write(buffer.getbuffer())

    write_atomically(path, write)


def read_tensors(path: Path, device: torch.device) -> dict[str, Any] | None:
    """What `write_tensors` wrote, without executing anything; None if absent or damaged."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file; all mean the same here
        log.warning("%s is damaged (%s); that part starts again.", path, type(error).__name__)
        return None
    return state


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` by name, without executing anything; `ValueError` if it is not a whole one."""
    content = path.read_bytes()
    if content[:2] != b"PK" or not zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError("it is none, or the end of it is missing")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # np.load raises many kinds for what is damaged, or no archive of plain arrays
        raise ValueError(str(error)) from None


def write_weights(path: Path, state: Mapping[str, Tensor]) -> str:
    """A safetensors file of the state dict; returns its SHA-256."""
    data = save({name: value.detach().cpu().clone().contiguous() for name, value in state.items()})
    write_atomically(path, lambda file: file.write(data))
    return hashlib.sha256(data).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
