"""Options that commands share, and how commands end."""

import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from undistill.auditing import MOST_SEEDS
from undistill.core.errors import LegibleFormatter, StoreError, UndistillError, legible, short_of_memory

if TYPE_CHECKING:
    from undistill.auditing.launchers import Launcher
    from undistill.core.progress import Progress

PATIENCE = 10.0  # seconds in which a second SIGTERM is ignored
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
FIRST = not LAUNCHED or os.environ["RANK"] == "0"  # the one that speaks


class Terminated(BaseException):
    """SIGTERM came."""


class Commands(TyperGroup):
    """Commands whose errors, if the user can mend them, end in one sentence and exit code 2."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`serve keys` is a command of two words: what is served and who may ask are two things."""
        if args[:2] == ["serve", "keys"]:
            args = ["serve keys", *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if logging.lastResort:
            logging.lastResort.setFormatter(LegibleFormatter())
        try:
            with _ending_on_signals():
                return super().invoke(ctx)
        except UndistillError as error:
            fail(str(error))
        except BrokenPipeError:  # whoever reads has seen enough, such as head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            where = f" {os.fsdecode(error.filename)}" if error.filename else ""
            fail(
                f"Cannot read or write{where}: {error.strerror or error}. What was finished is kept; "
                "mend that and run the same command again."
            )
        except (MemoryError, RuntimeError) as error:
            if not short_of_memory(error):
                raise
            fail(
                "This machine has too little memory for that. What was finished is kept: free some, or take fewer "
                "workers, and run the same command again. Smaller batches are another run, for another --out."
            )
        except KeyboardInterrupt:
            fail("Interrupted. The same command goes on from here.", 130)
        except Terminated:
            fail("Terminated. The same command goes on from here.", 143)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that it is left in order. For some seconds, others change nothing.

    While something is imported a signal waits: half an import of numpy or torch ends in errors of every kind.
    """
    first: list[float] = []

    def end(number: int, _: object) -> None:
        if _importing() and hasattr(signal, "setitimer"):
            waiting.append(number)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        now = time.monotonic()
        first.append(now)
        if len(first) == 1 or now - first[0] > PATIENCE or number == signal.SIGINT:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    waiting: list[int] = []
    handlers: dict[int, Any] = {signal.SIGTERM: end, signal.SIGINT: end}
    if hasattr(signal, "SIGALRM"):
        handlers[signal.SIGALRM] = lambda *_: end(waiting.pop(0), None) if waiting else None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except RuntimeError as error:
        if first:  # torch raises one for each reader of images that the same signal ended
            raise Terminated from error
        raise
    finally:
        if waiting:  # the command has ended by itself; its alarm must not find the handler gone
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing() -> bool:
    """Whether the main thread is in the middle of an import."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def fail(message: str, code: int = 2) -> None:
    who = "Error" if FIRST else f"Error in process {os.environ['RANK']}"
    print(f"{who}: {legible(message)}", file=sys.stderr)
    raise typer.Exit(code)


def say(message: str) -> None:
    if FIRST:
        print(legible(message))


@contextmanager
def working() -> Iterator["Progress"]:
    """Progress of a command that trains."""
    from undistill.core.progress import Progress
    from undistill.training.compute import keep_freed_memory

    keep_freed_memory()
    with Progress.to_stderr() if FIRST else Progress.silent() as progress:
        yield progress


_OUT = "Where the result goes; the same command resumes there."
TrainOut = Annotated[Path | None, typer.Option(help=_OUT, show_default="runs/DATA-MODEL")]
ProtectOut = Annotated[Path | None, typer.Option(help=_OUT, show_default="RUN-DEFENCE")]
CompareOut = Annotated[Path | None, typer.Option(help=_OUT, show_default="RUN-compare")]
AuditOut = Annotated[Path | None, typer.Option(help=_OUT, show_default="RUN-audit")]
Config = Annotated[Path | None, typer.Option(help="A YAML file of settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as recipe.epochs=30 or seed=1; repeatable."),
]


def use_data_dir(folder: Path | None) -> None:
    """Later commands and worker processes look there, too."""
    if folder:
        os.environ["UNDISTILL_DATA"] = os.path.realpath(os.path.expanduser(folder))


DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", callback=use_data_dir, help="Where public data sets lie, or are downloaded to."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Code = Annotated[
    str | None,
    typer.Option(
        "--model", help="Your own network again, file.py:factory; stored runs do not execute code by themselves."
    ),
]
OwnDefence = Annotated[
    list[str] | None,
    typer.Option("--defence", help="A defence of your own again, file.py:Name(...), for the same reason; repeatable."),
]
Fast = Annotated[
    bool,
    typer.Option("--fast", help="Choose precision, layout and compilation by a short trial (recipe.compute=auto)."),
]
Where = Annotated[str, typer.Option(help="Where cells are done: serial, pool, ray, or a listed one with its fields.")]
Workers = Annotated[int | None, typer.Option(help="Processes of the pool.")]
Address = Annotated[str | None, typer.Option(help="Of the Ray cluster.")]
Remember = Annotated[
    float, typer.Option(min=0, metavar="GIB", help="Disk that remembered answers may fill in a run folder; 0 is off.")
]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and about how long it takes.")]


Attacks = Annotated[
    list[str] | None, typer.Option("--attack", help="One more attack, listed or file.py:Name(...); repeatable.")
]
Students = Annotated[
    list[str] | None, typer.Option("--student", help="The thief's network instead of the suite's; repeatable.")
]
Seeds = Annotated[int, typer.Option(min=1, max=MOST_SEEDS, help="Students of each kind.")]
Trials = Annotated[
    int | None, typer.Option(min=1, help="Settings that each thief tries; by default as many as the suite says.")
]
Share = Annotated[float | None, typer.Option(help="Share of the epochs for which a trial trains.")]
Budget = Annotated[int | None, typer.Option(min=1, help="The most queries of each thief.")]
Pool = Annotated[str | None, typer.Option(metavar="DATA", help="Images of thieves who have none of yours.")]
Ledger = Annotated[
    Path | None,
    typer.Option(help="Where answers of a black box are kept and paid once.", show_default="OUT-bought"),
]
Cost = Annotated[
    float | None, typer.Option("--cost-per-1000", min=0, help="Price of 1,000 answers of a black box, to be said.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask before many answers are bought.")]
By = Annotated[str, typer.Option(help="Who audits, for the page: a name, a company.")]


def build_launcher(text: str, workers: int | None, address: str | None) -> "Launcher":
    from undistill.auditing.launchers import Launcher

    launcher = Launcher.from_user(text)
    given = {"workers": workers, "address": address}
    changed = {name: value for name, value in given.items() if value is not None}
    return type(launcher)(**(launcher.model_dump() | changed))


def beside(run: Path, what: str) -> Path:
    """RUN-what, next to RUN."""
    run = run if run.name not in ("", "..") else run.resolve()
    place = run.with_name(f"{run.name}-{what}")
    if place.is_symlink():
        raise StoreError(f"{place} is a link; if its target is meant, name it with --out.")
    return place
