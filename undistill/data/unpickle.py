"""Pickled batches, read without executing anything that they name."""

import pickle
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from undistill.core.errors import DataError, FileError
from undistill.core.files import MIB, open_regular

LARGEST = 512 * MIB

STEPS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS GLOBAL STACK_GLOBAL"
)
"""Steps of a pickle that Python carries out itself; all others are ours, or refused."""


def read_batch(path: Path) -> dict[str, Any]:
    """A pickled dict of plain containers, text, bytes and number arrays; `DataError` for anything else.

    Names are text or bytes. Even numpy's own functions are not called: what they would have been told is read as plain
    data.
    """
    try:
        with open_regular(path, LARGEST) as file:
            batch = _plain(_Unpickler(file, encoding="latin1").load(), {})
    except (OSError, FileError):
        raise
    except Exception as error:  # a crafted or damaged pickle can raise any kind, MemoryError and RecursionError too
        why = "it ends too early" if isinstance(error, EOFError) else str(error).rstrip(".") or type(error).__name__
        raise DataError(
            f"{path} is not used: {why}. If damaged, remove its folder, and it is downloaded again."
        ) from None
    if not isinstance(batch, dict):
        raise DataError(f"{path} is not used: it holds {type(batch).__name__}, not a batch.")
    return batch


class _Array:
    """Stands for numpy's ndarray while a pickle is read; holds bytes, shape and type."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[Any] | None = None

    def build(self, state: tuple[int, tuple[int, ...], "_Type", bool, bytes | str], encode: "_Encode") -> None:
        _, shape, kind, fortran, raw = state
        if isinstance(raw, str):  # Python 2 wrote bytes as text
            raw = encode(raw)
        sizes = type(shape) is tuple and len(shape) <= 4 and all(type(size) is int for size in shape)
        if not (sizes and isinstance(kind, _Type) and isinstance(raw, bytes)):
            raise pickle.UnpicklingError("an array in it is not made of numbers")
        self.values = np.frombuffer(raw, kind.code).reshape(shape, order="F" if fortran else "C")


class _Type:
    """Stands for numpy's dtype; its state says the byte order, which one byte and our machines do not need."""

    def __init__(self, code: str, *_: object) -> None:
        if _text(code) not in ("u1", "i8"):
            raise pickle.UnpicklingError(f"it holds an array of type {code[:60]!r}; only u1 and i8 are read")
        self.code = "<" + code

    def build(self, state: tuple[object, ...]) -> None:
        if state[1] == ">":
            self.code = ">" + self.code[1:]


class _Encode:
    """Stands for `_codecs.encode`, with which Python 3 writes bytes into old pickles. What it encoded is kept: a pickle
    may name one text many times."""

    def __init__(self) -> None:
        self._done: dict[str, bytes] = {}

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if _text(encoding) not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it encodes text as {encoding[:60]!r}")
        if _text(text) not in self._done:
            self._done[text] = text.encode("latin1")
        return self._done[text]


class _Dict(dict[str | bytes, Any]):
    """Stands for dict."""

    def __setitem__(self, name: str | bytes, value: Any) -> None:
        super().__setitem__(name if isinstance(name, bytes) else _text(name), value)


def _text(value: Any) -> str:
    """`UnpicklingError` for anything else, which may be so nested that to hash or to print it never ends."""
    if not isinstance(value, str):
        raise pickle.UnpicklingError(f"it holds {_kind(value)} where text is expected")
    return value


def _kind(value: Any) -> str:
    return type(value).__name__.lstrip("_")


def _empty_dict(unpickler: Any) -> None:
    unpickler.append(_Dict())


def _filled_dict(unpickler: Any) -> None:
    items, filled = unpickler.pop_mark(), _Dict()
    for name, value in zip(items[::2], items[1::2], strict=True):
        filled[name] = value
    unpickler.append(filled)


def _call(unpickler: Any) -> None:
    """Call only our stand-ins, with at most three arguments."""
    arguments, called = unpickler.stack.pop(), unpickler.stack[-1]
    if not (called in (_Array, _Type) or type(called) is _Encode) or type(arguments) is not tuple or arguments[3:]:
        raise pickle.UnpicklingError(f"it calls {_kind(called)}, which a batch of images has no use for")
    unpickler.stack[-1] = called(*arguments)


def _build(unpickler: Any) -> None:
    state, built = unpickler.stack.pop(), unpickler.stack[-1]
    if type(built) is _Array:
        built.build(state, unpickler.encode)
    elif type(built) is _Type:
        built.build(state)
    else:
        raise pickle.UnpicklingError(f"it changes {_kind(built)}, which a batch of images has no use for")


class _Steps(dict[int, Any]):
    def __missing__(self, step: int) -> Any:
        raise pickle.UnpicklingError(f"it takes the step {chr(step)!r}, which a batch of images has no use for")


class _Unpickler(pickle._Unpickler):
    """The one that is written in Python, whose steps can be chosen."""

    dispatch: ClassVar[Any] = _Steps(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in STEPS.split()}
        | {pickle.EMPTY_DICT[0]: _empty_dict, pickle.DICT[0]: _filled_dict}
        | {pickle.REDUCE[0]: _call, pickle.BUILD[0]: _build}
    )

    @cached_property
    def encode(self) -> _Encode:
        return _Encode()

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        known = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type, ("_codecs", "encode"): self.encode}
        if (module, name) not in known:
            named = f"{module[:60]}.{name[:60]}"
            raise pickle.UnpicklingError(
                f"it names {named!r}, and a batch of images has no use for that. Nothing of it was executed"
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
    raise pickle.UnpicklingError(f"it holds {_kind(value)}, which a batch of images has no use for")
