"""Tensors and arrays in files: weights, checkpoints, archives. Reading them executes nothing."""

import hashlib
import io
import logging
import math
import os
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from undistill.core.child import FORKS, in_child
from undistill.core.errors import FileError, short_of_memory
from undistill.core.files import GIB, MIB, open_regular, write_atomically

log = logging.getLogger(__name__)

LARGEST = 2 * GIB
SECONDS = 20.0  # that a child process has to read a file, beside one for every 20 MiB
DONE, DAMAGED = "done", "damaged: "
DIGEST = 64  # characters of a SHA-256


def write_tensors(path: Path, state: dict[str, Any], largest: int = LARGEST) -> None:
    """Nested plain containers and tensors, as `read_tensors` reads them, in torch's own format.

    Its hash lies in the comment of the zip archive that such a file is. What is larger than `largest`, and would not be
    read again, is not written; a warning says so.
    """
    buffer = io.BytesIO()  # torch's own writer hides why the disk refused
    torch.save(state, buffer)
    content = bytearray(buffer.getbuffer())
    if len(content) + DIGEST > largest:
        log.warning("%s would have %s bytes and is not kept; %s are read at most.", path, len(content), largest)
        return
    content[-2:] = DIGEST.to_bytes(2, "little")  # the length of the comment, until now 0
    content += hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, lambda file: file.write(content))


def read_tensors(path: Path, device: torch.device, largest: int = LARGEST) -> dict[str, Any] | None:
    """The state in a file of `write_tensors`; None, and a warning, if it is absent or damaged. Executes nothing."""
    if not path.exists():
        return None
    why, state = "larger than such a state", None
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= largest:
            why = _unlike_its_hash(file)
    try:
        state = None if why else load_state(path, device)
    except ValueError as error:
        why = str(error)
    if not isinstance(state, dict):
        log.warning("%s is damaged (%s); that part starts again.", path, why or "no state")
        return None
    return state


def _unlike_its_hash(file: IO[bytes]) -> str:
    """Why an open file of `write_tensors` is not the one that was written; empty if it is."""
    rest, sha = os.fstat(file.fileno()).st_size - DIGEST, hashlib.sha256()
    while rest > 0 and (part := file.read(min(rest, MIB))):
        sha.update(part)
        rest -= len(part)
    return "" if file.read() == sha.hexdigest().encode() else "its hash is another"


def load_state(path: Path, device: torch.device) -> Any:
    """The plain containers and tensors in a file that torch saved.

    Raises `ValueError` if it is damaged or anything else. Reading executes nothing, but a crafted pickle can take hours
    or all memory; so a child process reads it first, and `FileError` says that it could not.
    """
    size = path.stat().st_size

    def attempt() -> str:
        try:
            _load(path, torch.device("cpu"))
        except MemoryError:
            raise
        except Exception as error:  # torch raises many kinds for what is damaged, or no plain state
            return _said(error)
        return DONE

    if FORKS:
        answer = in_child(attempt, seconds=SECONDS + size / (20 * MIB), memory=8 * size + GIB)
        if answer.startswith(DAMAGED):
            raise ValueError(answer.removeprefix(DAMAGED))
        if answer != DONE:
            raise FileError(f"{path} cannot be read here ({answer}). Free memory, or remove it to begin again.")
    try:
        return _load(path, device)
    except Exception as error:
        if short_of_memory(error):
            raise
        raise ValueError(_said(error).removeprefix(DAMAGED)) from None


def _said(error: Exception) -> str:
    return f"{DAMAGED}{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _load(path: Path, device: torch.device) -> Any:
    with open_regular(path) as file:
        if zipfile.is_zipfile(file) and any(member.compress_type for member in zipfile.ZipFile(file).infolist()):
            raise ValueError("torch does not compress")  # and a compressed member may be far larger than the file
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles that are then refused, or read all the same
            with torch.serialization.safe_globals([Namespace]):  # the options that training scripts keep beside
                return torch.load(file, map_location=device, weights_only=True)


def read_arrays(path: Path, max_bytes: int = LARGEST) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` by name, without executing anything.

    Raises `ValueError` if it is not a whole archive of plain arrays, or if these need more than `max_bytes`.
    """
    with open_regular(path) as file:
        if file.read(2) != b"PK" or not zipfile.is_zipfile(file):
            raise ValueError("it is none, or the end of it is missing")
        try:
            with zipfile.ZipFile(file) as archive:
                names = _plain_members(archive, max_bytes)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
        except Exception as error:  # np.load raises many kinds for what is damaged
            raise ValueError(str(error) or type(error).__name__) from None


def _plain_members(archive: zipfile.ZipFile, max_bytes: int) -> list[str]:
    """The names of the arrays, but for those of objects; other files in the archive are passed over.

    `ValueError` unless all are as large as they announce, and all together not too large.
    """
    members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
    whole = sum(member.file_size for member in members)
    if whole > max_bytes:
        raise ValueError(f"it unpacks to {whole:,} bytes; max_bytes is {max_bytes:,}")
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    names = []
    for member in members:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"{member.filename} has the unknown version {version}")
            shape, _, kind = readers[version](file)
            size = member.file_size - file.tell()
        if kind.hasobject:
            continue
        if not kind.itemsize or math.prod(shape) * kind.itemsize != size:
            raise ValueError(f"{member.filename} is no plain array of the shape that it announces")
        names.append(member.filename.removesuffix(".npy"))
    return names


def write_weights(path: Path, state: Mapping[str, Tensor]) -> str:
    """A safetensors file of the state dict; returns its SHA-256."""
    data = save({name: value.detach().cpu().clone().contiguous() for name, value in state.items()})
    write_atomically(path, lambda file: file.write(data))
    return hashlib.sha256(data).hexdigest()


def same_form(one: Any, other: Any) -> bool:
    """Whether two states hold the same names, shapes and types, and finite numbers."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and (one.shape, one.dtype, one.layout) == (
            other.shape,
            other.dtype,
            other.layout,
        )
        return same and not one.is_meta and bool(one.isfinite().all())
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(same_form(value, other[name]) for name, value in one.items())
        )
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same_form, one, other))
    return type(one) is type(other) and (not isinstance(one, float) or math.isfinite(one))
