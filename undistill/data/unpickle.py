"""Pickled batches, read without executing anything that they name."""

import pickle
import pickletools
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from undistill.errors import DataError


def read_batch(path: Path) -> dict[str, Any]:
    """A pickled dict of plain containers, text, bytes and number arrays; `DataError` for anything else.

    Names are text or bytes. Even numpy's own functions are not called: what they would have been told is read as plain
    data.
    """
    try:
        with path.open("rb") as file:
            _refuse_bombs(file, path.stat().st_size)
            file.seek(0)
            batch = _plain(_Unpickler(file, encoding="latin1").load(), {})
    except OSError:
        raise
    except Exception as error:  # a crafted or damaged pickle can raise any kind, MemoryError and RecursionError too
        raise DataError(
            f"{path} is not used: {str(error) or type(error).__name__}. If damaged, remove its folder, and it "
            "is downloaded again."
        ) from None
    if not isinstance(batch, dict):
        raise DataError(f"{path} is not used: it holds {type(batch).__name__}, not a batch.")
    return batch


def _refuse_bombs(file: IO[bytes], size: int) -> None:
    """`UnpicklingError` for a memo numbered beyond what the file has room for: a few bytes would take gigabytes."""
    for code, argument, _ in pickletools.genops(file):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > size:
            raise pickle.UnpicklingError(f"it numbers an object {argument}, and is {size} bytes long.")


class _Array:
    """Stands for numpy's ndarray while a pickle is read; holds bytes, shape and type."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_Type", bool, bytes | str]) -> None:
        _, shape, kind, fortran, raw = state
        if isinstance(raw, str):  # Python 2 wrote bytes as text
            raw = raw.encode("latin1")
        if not (isinstance(kind, _Type) and isinstance(raw, bytes) and all(type(size) is int for size in shape)):
            raise pickle.UnpicklingError("an array in it is not made of numbers.")
        self.values = np.frombuffer(raw, kind.code).reshape(shape, order="F" if fortran else "C")


class _Type:
    """Stands for numpy's dtype; its state says the byte order, which one byte and our machines do not need."""

    def __init__(self, code: str, *_: object) -> None:
        if _text(code) not in ("u1", "i8"):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}; only u1 and i8 are read.")
        self.code = "<" + code

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] == ">":
            self.code = ">" + self.code[1:]


class _Encode:
    """Stands for `_codecs.encode`, with which Python 3 writes bytes into old pickles. What it encoded is kept: a pickle
    may name one text many times."""

    __slots__ = ("_done",)

    def __init__(self) -> None:
        self._done: dict[str, bytes] = {}

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if _text(encoding) not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it encodes text as {encoding!r}.")
        if _text(text) not in self._done:
            self._done[text] = text.encode("latin1")
        return self._done[text]


def _text(value: Any) -> str:
    """`UnpicklingError` for anything else, which may be so nested that to hash or to print it never ends."""
    if not isinstance(value, str):
        raise pickle.UnpicklingError(f"it holds {_kind(value)} where text is expected.")
    return value


def _kind(value: Any) -> str:
    return type(value).__name__.lstrip("_")


class _Dict(dict[str | bytes, Any]):
    """Stands for dict: hashing a nested tuple, as a name, may never end or break the stack."""

    def __setitem__(self, name: str | bytes, value: Any) -> None:
        super().__setitem__(name if isinstance(name, bytes) else _text(name), value)


def _empty_dict(unpickler: Any) -> None:
    unpickler.append(_Dict())


def _filled_dict(unpickler: Any) -> None:
    items, filled = unpickler.pop_mark(), _Dict()
    for name, value in zip(items[::2], items[1::2], strict=True):
        filled[name] = value
    unpickler.append(filled)


def _set(unpickler: Any) -> None:
    raise pickle.UnpicklingError("it holds a set, which a batch of images has no use for.")


class _Unpickler(pickle._Unpickler):
    """The one that is written in Python, whose steps can be replaced."""

    dispatch: ClassVar[Any] = pickle._Unpickler.dispatch | {
        pickle.EMPTY_DICT[0]: _empty_dict,
        pickle.DICT[0]: _filled_dict,
        pickle.EMPTY_SET[0]: _set,
        pickle.FROZENSET[0]: _set,
    }

    @cached_property
    def _encode(self) -> _Encode:
        return _Encode()

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        known = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type, ("_codecs", "encode"): self._encode}
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and a batch of images has no use for that. Nothing of it was executed."
            )
        return known[module, name]


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Arrays for their stand-ins, text for the bytes that Python 2 called so; `UnpicklingError` for what is neither.

    `done` holds, by id, what a pickle may name many times.
    """
    kind = type(value)
    if id(value) in done:
        return done[id(value)]
    if kind is _Array and value.values is not None:
        return value.values
    if kind is _Dict:
        return done.setdefault(id(value), {_plain(name, done): _plain(held, done) for name, held in value.items()})
    if kind in (list, tuple):
        return done.setdefault(id(value), kind(_plain(held, done) for held in value))
    if kind is bytes:
        return done.setdefault(id(value), value.decode("latin1"))
    if value is None or kind in (str, int, float, bool):
        return value
    raise pickle.UnpicklingError(f"it holds {_kind(value)}, which a batch of images has no use for.")
