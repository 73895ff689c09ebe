"""Inputs as no one should make them: a seeded stream of damaged and hostile files, each given to a command.

A case copies a small valid world into a sandbox, changes a few of its files, runs one command in this process, and
reports what must not happen: a traceback, a hang, code that is executed, a file outside that is read or written.
"""

import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.conftest import NASTY, STUDENT, TEACHER, toy_arrays
from tests.test_official import write_cifar10, write_idx, write_svhn, write_tiny
from undistill import api
from undistill.cli import app
from undistill.core import tensors
from undistill.core.files import seal
from undistill.core.tensors import write_tensors
from undistill.data import CIFAR10, MNIST, SVHN, TinyImageNet
from undistill.runs.folder import Claim

SECONDS = 60
FAST = [f"--set=recipe.{pair}" for pair in ("epochs=2", "batch_size=16", "lr=0.1")]
Random = random.Random


@dataclass
class World:
    """A folder with one valid thing of every kind; `secret` lies outside every sandbox."""

    folder: Path
    secret: Path
    case: Path
    """Where a case runs: paths in records mean what they meant when the world was made."""

    @classmethod
    def make(cls, folder: Path) -> "World":
        world, secret = folder / "case" / "sandbox", folder / "outside"  # where each case will find itself
        (secret / "folder").mkdir(parents=True)
        (secret / "file").write_text("precious")
        (secret / "weights.safetensors").write_bytes(b"precious")
        world.mkdir(parents=True)
        arrays = toy_arrays(per_class=12)
        np.savez(world / "toy.npz", **arrays)
        for number, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
            (world / "photos" / f"class{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(world / "photos" / f"class{label}" / f"{number:03}.png")
        data = world / "data"
        write_cifar10(data / "cifar-10-batches-py")
        write_idx(data / "mnist", MNIST)
        (data / "svhn").mkdir()
        write_svhn(data / "svhn")
        write_tiny(data / "tiny-imagenet-200")
        (world / "settings.yaml").write_text("seed: 1\nrecipe:\n  epochs: 1\n  views: {crop: 0.1, flip: true}\n")
        sandbox = Sandbox(world)
        sandbox.run("train", "--data", "toy.npz", "--model", TEACHER, "--out", "honest", *FAST)
        sandbox.run("protect", "honest", "--defence", NASTY, "--out", "victim")
        sandbox.run("audit", "victim", "--student", STUDENT, "--seeds", 1, "--out", "audit")
        state = load_file(world / "honest" / "weights.safetensors")
        save_file(state, world / "weights.safetensors")
        torch.save(state, world / "weights.pt")
        with _kept_checkpoints():
            sandbox.run("train", "--data", "toy.npz", "--model", TEACHER, "--out", "unfinished", *FAST)
        for name in ("run.json", "weights.safetensors", "metrics.jsonl"):
            (world / "unfinished" / name).unlink()
        row = {"name": "omega=0.1: CNN", "measured": {"0": {"accuracy": 50.0, "sheet": "x.png"}}}
        other = {"name": "omega=0.2: CNN", "measured": {"0": {"accuracy": 60.0, "divergence": 3.0}}}
        (world / "table.json").write_text(json.dumps({"rows": [row, other]}))
        Image.new("L", (16, 16), 9).save(world / "x.png")
        (folder / "case").rename(folder / "pristine")
        return cls(folder / "pristine" / "sandbox", secret, folder / "case")

    def sandbox(self) -> "Sandbox":
        """A new copy of the world, in the place of the last one."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.folder, self.case / "sandbox")
        return Sandbox(self.case / "sandbox")


@contextmanager
def _kept_checkpoints() -> Iterator[None]:
    """A finished run keeps them inside, as one that was stopped."""
    clear = Claim._clear_checkpoints
    Claim._clear_checkpoints = lambda _: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Claim._clear_checkpoints = clear  # type: ignore[method-assign]


@dataclass
class Sandbox:
    """A copy of the world in which one case runs."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    code: int = -1
    said: str = ""

    def run(self, *words: object) -> None:
        """Run a command; note what must not happen."""
        before, ended = os.getcwd(), None
        os.chdir(self.folder)
        os.environ["UNDISTILL_DATA"] = str(self.folder / "data")
        began = time.monotonic()
        try:
            with _alarm():
                ended = CliRunner().invoke(app, [str(word) for word in words])
        except Late:
            self.problems.append(f"hang: {words}")
        finally:
            os.chdir(before)
        if ended is None:
            return
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            import traceback

            where = "".join(traceback.format_exception(ended.exception)[-3:])
            self.problems.append(f"traceback: {words}\n{where}")
        if ended.exit_code == 2 and (len(ended.stderr) > 20_000 or "Error" not in ended.stderr):
            self.problems.append(f"no sentence: {words}\n{ended.stderr[:300]}")
        self.code, self.said = ended.exit_code, ended.output
        if "precious" in ended.output:
            self.problems.append(f"what lies outside was shown: {words}")
        if "\x1b" in ended.output:
            self.problems.append(f"escape sequence: {words}")
        if time.monotonic() - began > SECONDS:
            self.problems.append(f"slow: {words}")


@contextmanager
def _alarm() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


class Late(BaseException):
    """A case takes too long; no error that a command would turn into a sentence."""


class Guard:
    """Notes, by Python's audit events, what is done outside a sandbox; child processes included."""

    def __init__(self, secret: Path) -> None:
        self.secret, self.sandbox = str(secret), ""
        self.log, self._writer = os.pipe()
        os.set_blocking(self.log, False)
        sys.addaudithook(self._look)

    def problems(self) -> list[str]:
        try:
            return os.read(self.log, 1 << 16).decode(errors="replace").splitlines()
        except BlockingIOError:
            return []

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.sandbox or threading.current_thread() is not threading.main_thread():
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect"):
            self._note(f"{event} {arguments[0]!r}")
        elif event == "open" and arguments[0] is not None and not isinstance(arguments[0], int):
            path, _, flags = arguments
            wrote = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._see(event, path, writes=bool(wrote))
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.listdir", "os.scandir"):
            self._see(event, arguments[0], writes=event not in ("os.listdir", "os.scandir"))
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._see(event, arguments[1], writes=True)

    def _see(self, event: str, path: Any, *, writes: bool) -> None:
        where = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        if where.startswith(self.secret) or (writes and where and not self._may_write(where)):
            self._note(f"{event} {where}")

    def _may_write(self, where: str) -> bool:
        allowed = (self.sandbox, "/dev/", "/proc/", os.environ["XDG_CACHE_HOME"])
        return where.startswith(allowed) or "__pycache__" in where

    def _note(self, what: str) -> None:
        os.write(self._writer, (what[:300].replace("\n", " ") + "\n").encode(errors="replace"))


# What is done to a file.

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


Change = Callable[[Random, Path], None]
JSON: list[Change] = [change_json, change_json, change_json, change_bytes, change_kind]
BYTES: list[Change] = [change_bytes, change_bytes, change_kind]
STATE: list[Change] = [change_state, change_state, change_bytes, plant_pickle, change_kind]
ARRAYS: list[Change] = [change_arrays, change_arrays, change_bytes, change_kind]
TEXT: list[Change] = [change_text, change_text, change_bytes, change_kind]
TRAIN = ["train", "--model", TEACHER, "--out", "out", "--set=recipe.epochs=0", "--data"]

AUDIT: list[object] = ["audit", "victim", "--student", STUDENT, "--seeds", 1, "--out"]
PROTECT: list[object] = ["protect", "honest", "--defence", NASTY, "--out", "out", "--set=recipe.epochs=0"]
AGAIN: list[object] = ["train", "--data", "toy.npz", "--model", TEACHER, *FAST, "--out"]


@dataclass
class Target:
    """Files of which some are changed, the ways to change them, and the commands that read them."""

    files: list[str]
    changes: list[Change]
    commands: list[list[object]]


def check(source: str) -> list[list[object]]:
    return [["data", "check", source]]


def figure(name: str, source: str) -> list[object]:
    return ["figure", name, source]


TINY = "data/tiny-imagenet-200"
TARGETS = {
    "npz": Target(["toy.npz"], ARRAYS, check("toy.npz")),
    "photos": Target(["photos/*/*.png"], BYTES, check("photos")),
    "CIFAR": Target(["data/cifar-10-batches-py/*"], [*BYTES, plant_pickle], check("CIFAR10(validation=0.2)")),
    "IDX": Target(["data/mnist/*"], BYTES, check("MNIST(validation=0.3)")),
    "SVHN": Target(["data/svhn/*"], BYTES, check("SVHN(validation=0.3)")),
    "Tiny-ImageNet's lists": Target(
        [f"{TINY}/*.txt", f"{TINY}/val/*.txt"], TEXT, check("TinyImageNet(validation=0.2)")
    ),
    "Tiny-ImageNet's images": Target([f"{TINY}/*/*/*.JPEG"], BYTES, check("TinyImageNet(validation=0.2)")),
    "weights.pt": Target(["weights.pt"], STATE, [[*TRAIN, "toy.npz", "--weights", "weights.pt"]]),
    "weights": Target(["weights.safetensors"], BYTES, [[*TRAIN, "toy.npz", "--weights", "weights.safetensors"]]),
    "YAML": Target(
        ["settings.yaml"], [change_yaml, change_yaml, *BYTES], [[*TRAIN, "toy.npz", "--config", "settings.yaml"]]
    ),
    "run": Target(
        ["honest/run.json"] * 3 + ["honest/weights.safetensors"], JSON, [PROTECT, figure("training", "honest")]
    ),
    "metrics": Target(
        ["honest/metrics.jsonl", "honest/run.json"], [*JSON, change_text], [figure("training", "honest")]
    ),
    "victim": Target(["victim/run.json"], JSON, [figure("answers", "victim")]),
    "request": Target(["honest/request.json"], JSON, [[*AGAIN, "honest"]]),
    "checkpoint": Target(["unfinished/checkpoint-0.pt"], STATE, [[*AGAIN, "unfinished"]]),
    "report": Target(["audit/report.json"], JSON, [["report", "audit"]]),
    "evidence": Target(["audit/evidence.npz"], ARRAYS, [figure("answers", "audit"), figure("maps", "audit")]),
    "cells": Target(["audit/cells/*.json"], JSON, [[*AUDIT, "audit"]]),
    "answers": Target(["*/answers/*/*.safetensors"], BYTES, [[*AUDIT, "audit"], [*AUDIT, "anew"]]),
    "table": Target(
        ["table.json", "x.png"], JSON, [figure("ablation", "table.json"), figure("synthesised", "table.json")]
    ),
}


@contextmanager
def quick() -> Iterator[None]:
    """Inside, public data sets are as small as the world's, and audits end before their pictures."""
    counts = {CIFAR10: (100, 20), MNIST: (40, 20), SVHN: (40, 20), TinyImageNet: (18, 6)}
    kept = {source: source.counts for source in counts}
    pictures = api.write_evidence, api.write_report
    for source, numbers in counts.items():
        classes = 3 if source is TinyImageNet else 10
        source.counts = tuple((n // classes,) * classes for n in numbers)
    api.write_evidence = api.write_report = lambda *_: None
    seconds, tensors.SECONDS = tensors.SECONDS, 2.0
    try:
        yield
    finally:
        api.write_evidence, api.write_report = pictures
        tensors.SECONDS = seconds
        for source, numbers in kept.items():
            source.counts = numbers


def _commands(r: Random, name: str) -> list[list[object]]:
    """A command with a spec, or a setting, that no one should write."""
    if name == "set":
        fields = ["seed", "recipe.lr", "recipe", "recipe.views.crop", "recipe.views", "x", "recipe.drops", "", "."]
        value = r.choice([*YAML, str(anything(r))]).replace("\0", "")
        return [[*TRAIN, "toy.npz", f"--set={r.choice(fields)}={value}"]]
    where = r.choice(["--model", "--data", "--defence", "--attack", "--student"])
    given = f"{where}={spec(r)}"
    if where == "--defence":
        return [[*PROTECT, given]]
    if where in ("--attack", "--student"):
        return [[*AUDIT, "out", "--set=recipe.epochs=0", given]]
    return [[*TRAIN, "toy.npz", given]]


def _changed(r: Random, target: Target, folder: Path) -> list[list[object]]:
    """Change some files of `target` below `folder`; returns a command that reads them."""
    for pattern in dict.fromkeys(r.choices(target.files, k=r.choice([1, 1, 2]))):
        path = r.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        change = r.choice(target.changes)
        readable = change is not change_json or path.suffix in (".json", ".jsonl")
        (change if readable else change_bytes)(r, path)
    return [r.choice(target.commands)]


def case(seed: int, world: World, guard: Guard) -> list[str]:
    """Run the case `seed` in a new sandbox; returns what went wrong."""
    r = Random(seed)
    sandbox = world.sandbox()
    os.environ["FUZZ_SECRET"] = str(world.secret / "file")
    name = r.choice([*TARGETS, "specs", "specs", "set"])
    commands = _commands(r, name) if name in ("specs", "set") else _changed(r, TARGETS[name], sandbox.folder)
    guard.sandbox = str(world.case)
    try:
        for command in commands:
            sandbox.run(*command)
    finally:
        guard.sandbox = ""
    problems = sandbox.problems + guard.problems()
    if list(world.case.rglob("executed")):
        problems.append("code was executed")
    return [f"case {seed} ({name}): {problem}" for problem in problems]
