"""Inputs as no one should make them: a seeded stream of damaged and hostile files, each given to a command.

A case copies a small valid world into a sandbox, changes a few of its files, runs one command in this process, and
reports what must not happen: a traceback, a hang, code that is executed, a file outside that is read or written.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.conftest import NASTY, STUDENT, TEACHER, toy_arrays
from tests.fuzz_changes import (
    ARRAYS,
    BYTES,
    JSON,
    STATE,
    TEXT,
    YAML,
    Change,
    Random,
    anything,
    change_bytes,
    change_json,
    change_text,
    change_yaml,
    plant_pickle,
    spec,
)
from tests.test_official import write_cifar10, write_idx, write_svhn, write_tiny
from undistill.api import audits
from undistill.cli import app
from undistill.core import tensors
from undistill.data import CIFAR10, MNIST, SVHN, TinyImageNet
from undistill.report import page
from undistill.runs.folder import Claim

SECONDS = 60
FAST = [f"--set=recipe.{pair}" for pair in ("epochs=2", "batch_size=16", "lr=0.1")]


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
    pictures = audits.write_evidence, page.write_report
    for source, numbers in counts.items():
        classes = 3 if source is TinyImageNet else 10
        source.counts = tuple((n // classes,) * classes for n in numbers)
    audits.write_evidence = page.write_report = lambda *_: None
    seconds, tensors.SECONDS = tensors.SECONDS, 2.0
    try:
        yield
    finally:
        audits.write_evidence, page.write_report = pictures
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
