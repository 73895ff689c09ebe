"""Progress of long work: bars in a terminal, plain lines elsewhere, nothing when silent."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from undistill.core.errors import legible
from undistill.core.files import read_json

LINE_SECONDS = 10.0
PATIENCE = 2.0  # seconds of work before anything is said about how long it takes
PROGRESS_FILE = "progress.json"


class Task(Protocol):
    def advance(self, note: str = "") -> None:
        """One more is done."""

    def reach(self, done: int, note: str) -> None:
        """So many are done."""


class Progress:
    """`with progress.task("honest teacher", total=30) as task: task.advance("loss 0.3")`.

    Without bars every task prints a line when it ends, and one every `LINE_SECONDS` on its way. Behind it stands how
    long the outermost open task still takes, by the rate since it began.
    """

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._stack = ExitStack()
        self._work: list[_Work] = []

    @classmethod
    def silent(cls) -> Self:
        return cls(None)

    @classmethod
    def to_stderr(cls) -> Self:
        return cls(Console(file=sys.stderr, soft_wrap=True, highlight=False, force_jupyter=False))

    @classmethod
    @contextmanager
    def of(cls, asked: "Progress | bool | None") -> Iterator["Progress"]:
        """Progress as a caller of the Python API asked for it; None shows it in a notebook and nowhere else."""
        if isinstance(asked, Progress):
            yield asked
            return
        shown = _in_notebook() if asked is None else asked
        with cls.to_stderr() if shown else cls.silent() as progress:
            yield progress

    def say(self, text: str) -> None:
        """A line of its own, such as what is about to be done."""
        if self._console:
            self._console.print(text, markup=False)

    def __enter__(self) -> Self:
        if self._console and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}{task.fields[left]}", style="dim", markup=False),
            )
            self._bars = self._stack.enter_context(Bars(*columns, console=self._console))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._bars = None

    @contextmanager
    def task(self, name: str, total: int, done: int = 0, units: int = 1) -> Iterator[Task]:
        """A task of `total` steps, of which `done` were done before; it makes up `units` steps of the outermost one."""
        work = _Work(name, total, done, units)
        self._work.append(work)
        if self._bars:
            work.key = self._bars.add_task(name, total=total, completed=done, note="", left="")
        try:
            yield _Shown(self, work)
        finally:
            self._work.remove(work)
            if self._bars and work.key is not None:
                self._bars.remove_task(work.key)

    def show(self, work: "_Work", note: str) -> None:
        """Show that a task came as far as its `work` says."""
        whole = self._work[0]
        left = f"{duration(seconds)} left" if (seconds := self._left()) is not None else ""
        if self._bars and work.key is not None:
            self._bars.update(work.key, completed=work.done, note=note)
            assert whole.key is not None
            self._bars.update(whole.key, left=f" {left}")
        elif self._console and work.is_due():
            behind = [note, left if work is whole else left and f"{whole.name}: {left}"]
            said = " · ".join(filter(None, behind))
            self._console.print(f"{work.name}: {work.done}/{work.total} {said}".rstrip(), markup=False)

    def _left(self) -> float | None:
        """Seconds that the outermost task still takes; None as long as nobody can know."""
        whole, *inner = self._work
        now = sum(work.units * work.done / work.total for work in inner if work.total)
        before = sum(work.units * work.start / work.total for work in inner if work.total)
        done, elapsed = min(whole.done + now, whole.total), time.monotonic() - whole.began
        gained = done - whole.start - before
        is_known = gained > 0 and elapsed > PATIENCE and done < whole.total
        return elapsed / gained * (whole.total - done) if is_known else None


@dataclass(eq=False)
class _Work:
    """An open task."""

    name: str
    total: int
    done: int
    units: int = 1
    key: TaskID | None = None

    def __post_init__(self) -> None:
        self.start, self.began = self.done, time.monotonic()
        self.spoke = self.began

    def is_due(self) -> bool:
        """Whether a line is due: the task ends, or none was printed for a while."""
        now = time.monotonic()
        due = self.done == self.total or now - self.spoke >= LINE_SECONDS
        self.spoke = now if due else self.spoke
        return due


class _Shown:
    def __init__(self, progress: Progress, work: _Work) -> None:
        self._progress, self._work = progress, work

    def advance(self, note: str = "") -> None:
        self.reach(self._work.done + 1, note)

    def reach(self, done: int, note: str) -> None:
        if done > self._work.done:
            self._work.done = done
            self._progress.show(self._work, note)


def duration(seconds: float) -> str:
    """About how long, for a reader: 'about 40 s', 'about 4 min', 'about 2 h 10 min'."""
    if seconds < 90:
        return f"about {max(round(seconds / 5) * 5, 5)} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    hours, minutes = divmod(round(seconds / 600) * 10, 60)
    return f"about {hours} h {minutes} min" if hours < 48 else f"about {round(hours / 24)} days"


def _in_notebook() -> bool:
    """Whether this is the process of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class Reporter(Progress):
    """Progress of a worker process: it lies in a file, where a `Board` finds it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self._file = folder / PROGRESS_FILE

    @contextmanager
    def task(self, name: str, total: int, done: int = 0, units: int = 1) -> Iterator[Task]:
        yield _Report(self._file, name, total, done, units)


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
                self._tasks[file] = (
                    stack,
                    stack.enter_context(self._progress.task(report["name"], report["total"], units=report["units"])),
                )
            self._tasks[file][1].reach(report["done"], report["note"])


def _read_report(file: Path) -> dict[str, Any] | None:
    """The report of a worker; None for anything else."""
    report = {"units": 1} | (read_json(file) or {})
    kinds = {"name": str, "total": int, "done": int, "note": str, "units": int}
    if not all(isinstance(report.get(name), kind) for name, kind in kinds.items()):
        return None
    return report | {name: legible(report[name])[:200] for name in ("name", "note")}


class _Report:
    def __init__(self, file: Path, name: str, total: int, done: int, units: int) -> None:
        self._file, self._name, self._total, self._done, self._units = file, name, total, done, units

    def advance(self, note: str = "") -> None:
        self.reach(self._done + 1, note)

    def reach(self, done: int, note: str) -> None:
        self._done = done
        report = {"name": self._name, "total": self._total, "done": done, "note": note, "units": self._units}
        with suppress(OSError):  # no work fails for want of a report, nor waits for it to reach the disk
            self._file.write_text(json.dumps(report))
