"""Progress of long work: bars in a terminal, plain lines elsewhere, nothing when silent."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

LINE_SECONDS = 10.0


class Task(Protocol):
    def advance(self, note: str = "") -> None: ...


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
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}"),
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


class _Bar:
    def __init__(self, bars: Bars, key: TaskID) -> None:
        self._bars, self._key = bars, key

    def advance(self, note: str = "") -> None:
        self._bars.update(self._key, advance=1, note=note)


class _Lines:
    def __init__(self, console: Console | None, name: str, total: int, done: int) -> None:
        self._console, self._name, self._total, self._done = console, name, total, done
        self._spoke = time.monotonic()

    def advance(self, note: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        if self._console and (self._done == self._total or now - self._spoke >= LINE_SECONDS):
            self._console.print(f"{self._name}: {self._done}/{self._total} {note}")
            self._spoke = now
