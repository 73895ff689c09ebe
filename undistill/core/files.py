"""Files that are whole or absent, and that do no harm.

What is written is written beside its name, flushed to the disk, then renamed. What is read is a regular file of limited
size, and nothing in it is executed. A folder that somebody else made may hold anything: `require_plain` refuses one
with links before anything in it is read or written.
"""

import hashlib
import hmac
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock

from undistill.core import distributed
from undistill.core.errors import FileError, NonFinite, legible

MIB, GIB = 2**20, 2**30
LARGEST_TEXT = 64 * MIB
PART = re.compile(r"\.[0-9a-f]{16}\.part")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all. Of several processes that train together, the first alone writes.

    The content goes into a new file with a random name, created exclusively, which no link that lies there already can
    redirect; then it takes the place of `path`, and of a link with that name.
    """
    if distributed.rank() > 0:
        return
    part = fresh_name(path.parent)
    try:
        with part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def fresh_name(folder: Path) -> Path:
    """A path in `folder` at which there is nothing, known to `sweep` as unfinished work."""
    return folder / f".{secrets.token_hex(8)}.part"


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`. Only for who holds its lock."""
    for path in folder.iterdir():
        if PART.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Wait for the lock file `path`, and hold it inside. What killed processes left beside it is swept away.

    Without `wait`, filelock's `Timeout` is raised where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, timeout=-1 if wait else 0):
        sweep(path.parent)
        yield


def write_text(path: Path, text: str) -> None:
    """UTF-8; what comes from names that are not UTF-8 is written as escapes."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path, value: object) -> None:
    """Raises `NonFinite`, naming the field, for a number that JSON cannot hold."""
    write_text(path, _json(value, path, indent=2) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> str:
    """One JSON object on each line; returns the SHA-256 of the file."""
    text = "".join(_json(row, path) + "\n" for row in rows)
    write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def _json(value: object, path: object, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        field, number = next(_non_finite(value))
        raise NonFinite(f"{field} is {number}, which is not written to {path}: what is stored is finite.") from None


def _non_finite(value: object, field: str = "") -> Iterator[tuple[str, float]]:
    """The numbers that are NaN or infinite in nested containers, with the names of their fields."""
    if isinstance(value, float) and not math.isfinite(value):
        yield field, value
    elif isinstance(value, Mapping):
        for name, held in value.items():
            yield from _non_finite(held, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list | tuple):
        for number, held in enumerate(value):
            yield from _non_finite(held, f"{field}[{number}]")


def open_regular(path: Path, largest: int | None = None) -> BufferedReader:
    """Open a file for reading; `FileError` for a FIFO or device, which could keep us waiting, or a file too large."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode):
        file.close()
        raise FileError(f"{path} is {_kind(about.st_mode)}; only regular files are read.")
    if largest is not None and about.st_size > largest:
        file.close()
        raise FileError(f"{path} has {about.st_size:,} bytes; of such a file at most {largest:,} are read.")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes; `FileError` for any other."""
    with open_regular(path, largest) as file:
        return file.read(largest)


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """The text of a regular file of at most `largest` bytes; `ValueError` if it is not UTF-8."""
    return read_bytes(path, largest).decode()


def parse_json(text: str) -> Any:
    """The value that `text` holds; `ValueError` for what is no JSON, nested too deeply, or not finite."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds the number {text[:20]}")
    return number


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that `write_json` wrote; None if absent, unreadable or damaged."""
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError, FileError):
        return None
    return value if isinstance(value, dict) else None


def seal(record: Mapping[str, Any], key: bytes = b"") -> dict[str, Any]:
    """`record` with a hash of its content, by which damage and edits are recognised.

    Who can write the file can also make the hash anew, unless it takes a `key` that only we know.
    """
    content = _json(dict(sorted(record.items())), "a record")
    return {**record, "sha256": hmac.new(key, content.encode(), "sha256").hexdigest()}


def unseal(record: Mapping[str, Any], key: bytes = b"") -> dict[str, Any] | None:
    """The record that `seal` was given; None if its hash is not that of its content."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    return content if record.get("sha256") == seal(content, key)["sha256"] else None


@cache
def machine_key() -> bytes:
    """A secret of this user on this machine, by which we recognise what we measured here ourselves."""
    import pooch

    path = Path(pooch.os_cache("undistill")) / "machine.key"
    try:
        with locked(path.with_name(".lock")):
            if not path.exists():
                write_atomically(path, lambda file: file.write(secrets.token_bytes(32)))
                path.chmod(0o600)
            key = read_bytes(path, 32)
            if len(key) < 32:
                raise OSError(f"{path} is cut off")
            return key
    except OSError:  # no place to keep one: what is measured now is found again by nobody else
        return secrets.token_bytes(32)


def sha256(path: Path, largest: int | None = None) -> str:
    """SHA-256 of a regular file of at most `largest` bytes."""
    with open_regular(path, largest) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_plain(folder: Path) -> None:
    """Raise `FileError` unless everything below `folder` is a regular file or a folder.

    A link could have us read or overwrite what lies elsewhere. `folder` itself was named by the user, and may be one.
    """
    todo = [folder]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    kind = _kind(entry.stat(follow_symlinks=False).st_mode)
                    raise FileError(
                        f"{legible(entry.path)} is {kind}. Below {folder} only files and folders are used, since a "
                        "link could lead anywhere. Remove it, or put a copy of what it names into its place."
                    )


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, where `name` or a link may be somebody else's; `FileError` if it leads out of the folder."""
    parts, path = PurePosixPath(name).parts, folder / name.replace("\0", "")
    above = not parts or {"..", "/"} & {*parts} or {"\0", "\\"} & {*name}
    if above or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise FileError(
            f"{legible(str(path))[:300]} leads out of {folder} and is not used. Where a link is meant, put a copy of "
            "what it names into its place."
        )
    return path
