"""Progress of long work: bars in a terminal, plain lines elsewhere, nothing when silent."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from undistill.core.errors import legible
from undistill.core.files import read_json

LINE_SECONDS = 10.0
PROGRESS_FILE = "progress.json"


class Task(Protocol):
    def advance(self, note: str = "") -> None:
        """One more is done."""

    def reach(self, done: int, note: str) -> None:
        """So many are done."""


class Progress:
    """`with progress.task("honest teacher", total=30) as task: task.advance("loss 0.3")`.

    Without bars every task prints a line when it ends, and one every `LINE_SECONDS` on its way.
    """

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._stack = ExitStack()

    @classmethod
    def silent(cls) -> Self:
        return cls(None)

    @classmethod
    def to_stderr(cls) -> Self:
        return cls(Console(file=sys.stderr, soft_wrap=True, highlight=False))

    def __enter__(self) -> Self:
        if self._console and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
            )
            self._bars = self._stack.enter_context(Bars(*columns, console=self._console))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._bars = None

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        if self._bars:
            key = self._bars.add_task(name, total=total, completed=done, note="")
            try:
                yield _Bar(self._bars, key)
            finally:
                self._bars.remove_task(key)
        else:
            yield _Lines(self._console, name, total, done)


class Reporter(Progress):
    """Progress of a worker process: it lies in a file, where a `Board` finds it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self._file = folder / PROGRESS_FILE

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        yield _Report(self._file, name, total, done)


class Board:
    """Shows what workers report in the folders below `folder`, one task each."""

    def __init__(self, progress: Progress, folder: Path) -> None:
        self._progress, self._folder = progress, folder
        self._tasks: dict[Path, tuple[ExitStack, Task]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stack, _task in self._tasks.values():
            stack.close()

    def look(self) -> None:
        """Take up new reports, and drop those of finished work."""
        reports = {file: _read_report(file) for file in self._folder.glob(f"*/{PROGRESS_FILE}")}
        for file in self._tasks.keys() - reports.keys():
            self._tasks.pop(file)[0].close()
        for file, report in reports.items():
            if report is None:
                continue
            if file not in self._tasks:
                stack = ExitStack()
                self._tasks[file] = stack, stack.enter_context(self._progress.task(report["name"], report["total"]))
            self._tasks[file][1].reach(report["done"], report["note"])


def _read_report(file: Path) -> dict[str, Any] | None:
    """The report of a worker; None for anything else."""
    report = read_json(file) or {}
    kinds = {"name": str, "total": int, "done": int, "note": str}
    if not all(isinstance(report.get(name), kind) for name, kind in kinds.items()):
        return None
    return report | {name: legible(report[name])[:200] for name in ("name", "note")}


class _Report:
    def __init__(self, file: Path, name: str, total: int, done: int) -> None:
        self._file, self._name, self._total, self._done = file, name, total, done

    def advance(self, note: str = "") -> None:
        self.reach(self._done + 1, note)

    def reach(self, done: int, note: str) -> None:
        self._done = done
        report = {"name": self._name, "total": self._total, "done": done, "note": note}
        with suppress(OSError):  # no work fails for want of a report, nor waits for it to reach the disk
            self._file.write_text(json.dumps(report))


class _Bar:
    def __init__(self, bars: Bars, key: TaskID) -> None:
        self._bars, self._key = bars, key

    def advance(self, note: str = "") -> None:
        self._bars.update(self._key, advance=1, note=note)

    def reach(self, done: int, note: str) -> None:
        self._bars.update(self._key, completed=done, note=note)


class _Lines:
    def __init__(self, console: Console | None, name: str, total: int, done: int) -> None:
        self._console, self._name, self._total, self._done = console, name, total, done
        self._spoke = time.monotonic()

    def advance(self, note: str = "") -> None:
        self.reach(self._done + 1, note)

    def reach(self, done: int, note: str) -> None:
        news, self._done = done > self._done, done
        now = time.monotonic()
        if self._console and news and (done == self._total or now - self._spoke >= LINE_SECONDS):
            self._console.print(f"{self._name}: {self._done}/{self._total} {note}", markup=False)
            self._spoke = now
