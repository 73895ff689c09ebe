"""Ways to damage a file or a text: bytes, kinds, values, pickles, arrays; each is drawn from a seeded stream."""

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conftest import NASTY, STUDENT, TEACHER
from undistill.core.files import seal
from undistill.core.tensors import write_tensors

Random = random.Random
Change = Callable[[Random, Path], None]

SPECIAL = [
    0,
    -1,
    1,
    7.5,
    1e308,
    -1e308,
    10**400,
    "",
    "x" * 3000,
    "../../outside/file",
    "/etc/passwd",
    "\x1b[2J",
    "a\0b",
]
SPECIAL += [
    None,
    True,
    [],
    {},
    [[]],
    {"a": {}},
    "\udce9",
    "[/b]",
    "<script>",
    "NaN",
    "Nasty(T=0)",
    "f.py:X",
    "~nobody/x",
]


def anything(r: Random) -> Any:
    letters = "".join(map(chr, r.choices(range(1, 300), k=9)))
    return r.choice([r.choice(SPECIAL), r.uniform(-10, 10), r.randint(-(2**63), 2**63), letters])


def change_bytes(r: Random, path: Path) -> None:
    content = bytearray(path.read_bytes()) or bytearray(b"x")
    for _ in range(r.choice([1, 1, 1, 2, 5, 50])):
        at, kind = r.randrange(len(content) or 1), r.randrange(6)
        if kind == 0 and content:
            content[at] ^= 1 << r.randrange(8)
        elif kind == 1 and content:
            content[at] = r.choice([0, 1, 100, 127, 128, 255])
        elif kind == 2:
            del content[at : at + r.choice([1, 4, 100, len(content)])]
        elif kind == 3:
            content[at:at] = r.randbytes(r.choice([1, 8, 300]))
        elif kind == 4:
            content[at:at] = content[: r.choice([4, 64, 4096])]
        else:
            content[at : at + 8] = r.choice([2**31 - 1, 2**63 - 1, 2**32 - 1, 0]).to_bytes(8, "little")
    path.write_bytes(content)


def change_kind(r: Random, path: Path) -> None:
    """Into something that is no such file."""
    kinds = ["empty", "folder", "FIFO", "dangling", "loop", "large", "missing", "other", "dev"]
    if path.parent.name != "sandbox":  # where the user named the file himself, a link is followed
        kinds.append("link")
    kind = r.choice(kinds)
    content = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "large":
        path.touch()
        os.truncate(path, 3 * 2**30)
    elif kind == "other":
        path.write_bytes(content[::-1])
    elif kind != "missing":
        path.symlink_to(
            {"link": os.environ["FUZZ_SECRET"], "dangling": "nowhere", "loop": path.name, "dev": "/dev/zero"}[kind]
        )


def change_value(r: Random, value: Any, depth: int = 0) -> Any:
    """One thing, somewhere in nested containers."""
    if isinstance(value, dict) and value and r.random() < 0.95:
        name = r.choice(list(value))
        changed = dict(value)
        what = r.random()
        if what < 0.1:
            del changed[name]
        elif what < 0.15:
            changed[r.choice(["", "x", "self", "\x1b"])] = anything(r)
        else:
            changed[name] = change_value(r, value[name], depth + 1)
        return changed
    if isinstance(value, list) and value and r.random() < 0.8:
        at = r.randrange(len(value))
        return [*value[:at], change_value(r, value[at], depth + 1), *value[at + 1 :]]
    return anything(r)


def change_json(r: Random, path: Path) -> None:
    text = path.read_text()
    try:
        value = json.loads(text)
    except ValueError:
        return change_bytes(r, path)
    for _ in range(r.choice([1, 1, 2, 4])):
        value = change_value(r, value)
    if r.random() < 0.5 and isinstance(value, dict):  # as who knows how it is sealed
        with suppress(Exception):
            value = seal({name: held for name, held in value.items() if name != "sha256"})
    text = json.dumps(value)
    path.write_text(
        r.choice([text, text, text, text.replace("1", "NaN", 1), text.replace("0", "1e999", 1), "[" * 5000 + text])
    )
    return None


def change_state(r: Random, path: Path) -> None:
    """A torch file, with a hash of its new content."""
    state = torch.load(path, weights_only=True)

    def other(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and r.random() < 0.7:
            return r.choice(
                [
                    lambda: value.new_full(value.shape, float("nan")) if value.is_floating_point() else value * 2,
                    lambda: torch.zeros(r.choice([(0,), (1,), (2, 3), ()])),
                    lambda: value.double() * 1e300,
                    lambda: value.to("meta"),
                    lambda: torch.zeros(1).expand(10**9),
                    lambda: value.bool(),
                    lambda: value.float().to_sparse() if value.dim() else value,
                ]
            )()
        if isinstance(value, dict) and value:
            name = r.choice(list(value))
            return {**value, r.choice([name, name, name, 1, "x"]): other(value[name])}
        if isinstance(value, list) and value:
            at = r.randrange(len(value))
            return [*value[:at], other(value[at]), *value[at + 1 :]]
        return r.choice([value, None, -1, 99, "x", 1e300, float("nan"), {}, []])

    for _ in range(r.choice([1, 1, 2, 3])):
        state = other(state)
    if path.name.startswith("checkpoint"):
        write_tensors(path, state)
    else:
        torch.save(state, path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


NESTED = b"\x80\x02}(" + b")q\x01" + b"h\x01\x86q\x01" * 45 + b"K\x01u."
PICKLES = [pickle.dumps(Evil()), pickle.dumps({"a": Evil()}, 2), NESTED, b"", b"\x80\x02.", b"\x80\x05N.", b"(" * 5000]
PICKLES += [
    b"\x80\x02c__builtin__\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x10tR.",
    b"cos\nsystem\n(S'touch executed'\ntR.",
]


def plant_pickle(r: Random, path: Path) -> None:
    """A hostile pickle, alone or as the heart of a torch file."""
    content = r.choice(PICKLES)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", r.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, held in members.items():
                archive.writestr(name, content if name.endswith("data.pkl") else held)
        content = buffer.getvalue()
    path.write_bytes(content)


def change_arrays(r: Random, path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    for _ in range(r.choice([1, 1, 2])):
        name = r.choice(list(arrays))
        with np.errstate(all="ignore"):
            arrays[name] = _other_array(r, arrays[name])
        if r.random() < 0.2 and len(arrays) > 1:
            del arrays[name]
    np.savez_compressed(path, **arrays)


def _other_array(r: Random, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind == "U":
        return np.array(["x"] * r.choice([0, 1, 3, 50]))
    kinds: list[Callable[[], np.ndarray]] = [
        lambda: value[:0],
        lambda: value[..., None],
        lambda: value.astype(r.choice(["f4", "f8", "i8", "u2", "b1", "c8", "U3"])),
        lambda: np.full(value.shape, np.nan),
        lambda: value.ravel(),
        lambda: value[::2],
        lambda: np.array(["\ud800", "\x1b[2J", "<b>"]),
        lambda: np.array(5),
        lambda: np.zeros(3 * 10**8 if r.random() < 0.1 else 3, np.uint8),
    ]
    return r.choice(kinds)()


def change_text(r: Random, path: Path) -> None:
    lines = path.read_text().splitlines() or [""]
    for _ in range(r.choice([1, 2, 5])):
        at = r.randrange(len(lines))
        lines[at] = r.choice(
            [str(anything(r)), lines[at] * 2, "../" + lines[at], "/" + lines[at], lines[at].replace("\t", " ")]
        )
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))


YAML = [
    "&a [*a]",
    "!!python/object/apply:os.system [exit]",
    "? [a]\n: 1",
    "a: &a [x]\nb: *a",
    "[" * 3000,
    "{" * 30,
    "- 1",
    "1: 2",
]
YAML += [
    "recipe: {1: 2}",
    "self: 1",
    "seed: 0x" + "f" * 5000,
    "recipe: null",
    "seed: .nan",
    "seed: 1e400",
    "recipe: [1]",
    "\0",
    "a: !x 1",
]


def change_yaml(r: Random, path: Path) -> None:
    text = path.read_text()
    path.write_bytes(
        r.choice([r.choice(YAML), text + r.choice(YAML), text.replace("1", str(anything(r)))]).encode(
            "utf-8", "replace"
        )
    )


SPECS = [
    TEACHER,
    NASTY,
    STUDENT,
    "SoftLabels(T=4, alpha=0.9)",
    "Recipe(views=Views(crop=0.1))",
    "Folder(path='photos', size=8)",
]
SPECS += [
    "DAFL()",
    "ResNet(depth=18)",
    "DeepInversion(count=4)",
    "net.py:make",
    "builtins:exec",
    "os:system(1)",
    "timm:x",
    "Digits(count=50)",
]


def spec(r: Random) -> str:
    text = r.choice(SPECS)
    for _ in range(r.choice([0, 1, 1, 2, 4])):
        at = r.randrange(len(text) + 1)
        text = (
            text[:at]
            + r.choice(
                [
                    "(",
                    ")",
                    "=",
                    ",",
                    "'",
                    "9" * r.choice([1, 30, 5000]),
                    "nan",
                    "-",
                    ".",
                    ":",
                    "\x1b",
                    "x",
                    str(anything(r)),
                ]
            )
            + text[at + r.choice([0, 1, 4]) :]
        )
    return text.replace("\0", "")


JSON: list[Change] = [change_json, change_json, change_json, change_bytes, change_kind]
BYTES: list[Change] = [change_bytes, change_bytes, change_kind]
STATE: list[Change] = [change_state, change_state, change_bytes, plant_pickle, change_kind]
ARRAYS: list[Change] = [change_arrays, change_arrays, change_bytes, change_kind]
TEXT: list[Change] = [change_text, change_text, change_bytes, change_kind]
