"""`Launcher`: where the cells of an audit are done. Every launcher gives the same cells."""

import logging
import math
import multiprocessing
import multiprocessing.connection
import signal
import socket
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, PrivateAttr, field_validator

from undistill.auditing.cell import Job, Result, relisted
from undistill.auditing.order import Order, perform
from undistill.auditing.together import grouped, run_together
from undistill.auditing.worker import serve
from undistill.core.child import death, is_native_fault
from undistill.core.errors import LaunchError, remark
from undistill.core.progress import Board, Progress
from undistill.core.spec import Spec

log = logging.getLogger(__name__)

POLL = 0.5  # seconds between two looks at the workers
STOP = 5.0  # seconds that a worker has to end
MOST = 16  # students in the same steps, unless a number is named
MOST_STACKED = 4096
PATIENCE = 3  # how many workers may be lost in a row without a cell in between


def unfinished(jobs: Sequence[Job], cells: Path) -> set[str]:
    """Keys of the cells that are still to be done."""
    return {job.key for job in jobs if not (cells / f"{job.key}.json").exists()}


class Launcher(Spec):
    """Lost workers' cells are done again; a cell that fails ends the audit, and finished cells are kept."""

    quiet = ("stacked",)
    stacked: int | Literal["auto"] = 1
    """Most students of one kind that are trained in the same steps; `auto` are 16, where a trial shows that it pays.
    Above 1, results are equal up to rounding only."""

    @field_validator("stacked", mode="before")
    @classmethod
    def _a_number_or_auto(cls, stacked: Any) -> Any:
        if stacked != "auto" and not (type(stacked) is int and 1 <= stacked <= MOST_STACKED):
            raise ValueError(f"it is a number of students from 1 to {MOST_STACKED}, or 'auto'")
        return stacked

    @property
    def most(self) -> int:
        """Students in the same steps at most."""
        return MOST if self.stacked == "auto" else self.stacked

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, what `run` has started stays for the next run."""
        yield

    @abstractmethod
    def run(self, jobs: Sequence[Job], cells: Path, progress: Progress) -> list[Any]:
        """The cell of every job, in the jobs' order; `cells` is a folder that all processes share."""

    def _groups(self, jobs: Sequence[Job], workers: int) -> dict[str, list[Job]]:
        """Jobs that are done together, by the key of the first of them; few enough that no worker is idle."""
        share = max(math.ceil(len({job.key for job in jobs}) / workers), 1)
        return {group[0].key: group for group in grouped(jobs, min(self.most, share))}

    def _order(self, group: Sequence[Job], cells: Path, threads: int) -> Order:
        return Order.of(group, cells, threads, self.stacked == "auto")


class Serial(Launcher):
    """In this process, one after the other; `stacked` students of one kind are trained in the same steps."""

    def run(self, jobs: Sequence[Job], cells: Path, progress: Progress) -> list[Any]:
        new, done = unfinished(jobs, cells), dict[str, Result]()
        groups = grouped(jobs, self.most)
        with progress.task("audit", sum(map(len, groups)), done=sum(map(len, groups)) - len(new)) as task:
            for group in groups:
                for job, result in run_together(group, cells, progress, tries=self.stacked == "auto"):
                    done[job.key] = result
                    if job.key in new:
                        task.advance()
        return [relisted(done[job.key], job) for job in jobs]


class Pool(Launcher):
    """In `workers` processes on this machine, which share its cores; on GPUs, one for each in turn.

    Each of them may train several students in the same steps, see `Serial`.
    """

    workers: int = Field(2, ge=1, le=512)
    threads: int = Field(0, ge=0, le=1024)
    """Threads of each worker; 0 divides the cores."""
    _crew: "Crew | None" = PrivateAttr(None)

    @contextmanager
    def ready(self) -> Iterator[None]:
        with Crew(self.workers) as self._crew:
            try:
                yield
            finally:
                self._crew = None

    def run(self, jobs: Sequence[Job], cells: Path, progress: Progress) -> list[Any]:
        new = unfinished(jobs, cells)
        if not new:  # no worker is needed to read them
            return Serial().run(jobs, cells, progress)
        if (crew := self._crew) is None:
            with self.ready():
                return self.run(jobs, cells, progress)
        if any(job.pair.options.device.type == "cuda" for job in jobs):
            self._say_what_is_better(torch.cuda.device_count())
        groups = self._groups(jobs, self.workers)
        orders = {key: self._order(group, cells, self._threads()) for key, group in groups.items()}
        todo, every = deque(orders), {job.key for job in jobs}
        done: dict[str, Result] = {}
        lost = 0  # deaths without a cell in between
        with (
            progress.task("audit", len(every), done=len(every) - len(new)) as task,
            Board(progress, cells) as board,
        ):
            while len(done) < len(every):
                crew.assign(todo, orders)
                for key, results in crew.finished(POLL):
                    if isinstance(results, Death):
                        lost += 1
                        if len(groups[key]) > 1 and is_native_fault(results.exitcode):  # of one of them
                            log.warning("A worker ended with %s; its cells are done again one by one.", results)
                            alone = {job.key: self._order([job], cells, self._threads()) for job in groups[key]}
                            groups |= {job.key: [job] for job in groups[key]}
                            orders |= alone
                            todo.extendleft(alone)
                            continue
                        orders[key] = self._again(orders[key], results, lost)
                        todo.appendleft(key)
                        continue
                    if isinstance(results, Exception):
                        raise results
                    done, lost = done | results, 0
                    for _ in new & results.keys():
                        task.advance()
                board.look()
        return [relisted(done[job.key], job) for job in jobs]

    def _say_what_is_better(self, gpus: int) -> None:
        """Advise stacked students where there are more workers than GPUs."""
        if self.workers > gpus:
            better = f"Pool(workers={gpus}, stacked=16)" if gpus > 1 else "Serial(stacked=16)"
            remark(
                f"{self.workers} workers share {gpus} GPU{'s' * (gpus > 1)}, and each holds images and answers of its "
                f"own. --launcher '{better}' trains as many students at once with one copy for each GPU."
            )

    def _again(self, order: "Order", death: "Death", lost: int) -> "Order":
        """The order to try after a worker's death; `LaunchError` where nothing is left to try."""
        fault = is_native_fault(death.exitcode)
        if (fault and order.exact) or lost == PATIENCE:
            raise LaunchError(f"{self._why(death, fault, lost)} Finished cells are kept.")
        log.warning("A worker ended with %s; its cell is done again%s.", death, " with exact compute settings" * fault)
        return replace(order, exact=order.exact or fault)

    def _why(self, death: "Death", fault: bool, lost: int) -> str:
        if fault:
            return (
                f"A worker ended with {death}, with exact compute settings as well. Try others with --set, such as "
                "recipe.compute.layout=channels_last, or update torch."
            )
        if death.exitcode and death.exitcode > 0:
            return (
                f"Workers ended with {death} {lost} times in a row. A script of your own must call audit() below "
                "if __name__ == '__main__':, or its workers run it again."
            )
        fewer = f"Pool(workers={max(self.workers - 1, 1)})"
        return f"Workers ended with {death}, {lost} times in a row; use fewer: {fewer}."

    def _threads(self) -> int:
        return self.threads or max(torch.get_num_threads() // self.workers, 1)


@dataclass(frozen=True)
class Death:
    """A worker that ended in the middle of a cell."""

    exitcode: int | None

    def __str__(self) -> str:
        return death(self.exitcode)


class Crew:
    """Worker processes, each told what to do through a pipe of its own, so that it is known what a dead one was doing.

    They are started when there is work for them. None of them outlives the block, however it is left.
    """

    def __init__(self, size: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[Worker | None] = [None] * size

    def _start(self, number: int) -> "Worker":
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, number))
        with _interrupts_blocked():
            process.start()
        theirs.close()
        return Worker(process, ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        started = [worker for worker in self._workers if worker]
        for worker in started:
            worker.pipe.close()  # at which an idle one ends
            if kind is not None:
                worker.process.terminate()
        for worker in started:
            worker.process.join(STOP)
            worker.process.kill()
            worker.process.join()

    def assign(self, todo: deque[str], orders: Mapping[str, "Order"]) -> None:
        """Give every idle worker the next order; dead ones are replaced."""
        for number, worker in enumerate(self._workers):
            if not todo:
                return
            if worker and worker.key:
                continue
            if worker and not worker.process.is_alive():
                worker.pipe.close()
                worker = None
            if worker is None:
                worker = self._workers[number] = self._start(number)
            worker.key = todo.popleft()
            with suppress(OSError):  # one that died meanwhile is noticed by `finished`
                worker.pipe.send(orders[worker.key])

    def finished(self, seconds: float) -> Iterator[tuple[str, dict[str, Result] | Exception | Death]]:
        """Results, errors and deaths of workers within `seconds`, by the key of the order."""
        busy: dict[Any, Worker] = {worker.pipe: worker for worker in self._workers if worker and worker.key}
        for pipe in multiprocessing.connection.wait(list(busy), seconds):
            worker = busy[pipe]
            try:
                result = worker.pipe.recv()
            except (EOFError, OSError):  # its end of the pipe is closed: it died
                worker.process.join(STOP)
                result = Death(worker.process.exitcode)
            key, worker.key = worker.key, ""
            yield key, result


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that is started inside never sees Ctrl-C, not even while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would unblock it at the first start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class Worker:
    """A process, our end of the pipe to it, and the key of the order that it does now, if any."""

    process: Any
    pipe: Connection
    key: str = ""


class Ray(Launcher):
    """On a Ray cluster whose machines share the folders of this one; needs `pip install undistill[ray]`."""

    address: str = "auto"
    """`auto` finds the cluster of this machine; `local` starts one; else `HOST:PORT` or `ray://HOST:PORT`."""
    cpus: float = Field(1.0, gt=0)
    """CPUs of each cell, which computes with as many threads."""
    gpus: float = Field(0.0, ge=0)

    def run(self, jobs: Sequence[Job], cells: Path, progress: Progress) -> list[Any]:
        new = unfinished(jobs, cells)
        if not new:  # no cluster is needed to read them
            return Serial().run(jobs, cells, progress)
        if any(job.pair.options.device.type == "cuda" for job in jobs) and not self.gpus:
            raise LaunchError(
                "The cells compute on a GPU, and Ray gives them none: --launcher 'Ray(gpus=1)', or a share of one; "
                "or --device cpu."
            )
        ray = self._connect()
        remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=PATIENCE)(perform)
        every, share = {job.key for job in jobs}, max(int(ray.cluster_resources().get("CPU", 1) / self.cpus), 1)
        groups = self._groups(jobs, share)
        orders = {key: self._order(group, cells, max(int(self.cpus), 1)) for key, group in groups.items()}
        done: dict[str, Result] = {}
        try:
            with (
                progress.task("audit", len(every), done=len(every) - len(new)) as task,
                Board(progress, cells) as board,
            ):
                todo = {remote.remote(order): key for key, order in orders.items()}
                while todo:
                    finished, _ = ray.wait(list(todo), timeout=POLL)
                    for future in finished:
                        key = todo.pop(future)
                        try:
                            results = self._result(ray, future)
                        except ray.exceptions.WorkerCrashedError as error:
                            orders[key] = self._again(orders[key], error)
                            todo[remote.remote(orders[key])] = key
                        else:
                            done |= results
                            for _ in new & results.keys():
                                task.advance()
                    board.look()
        finally:
            ray.shutdown()
        return [relisted(done[job.key], job) for job in jobs]

    def _connect(self) -> Any:
        try:
            import ray
        except ImportError:
            raise LaunchError("The launcher Ray needs ray: pip install 'undistill[ray]'.") from None
        try:
            _require_listening(self.address)
            address = None if self.address == "local" else self.address
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # ray raises many kinds for an address where no cluster answers
            raise LaunchError(
                f"No Ray cluster answers at '{self.address}' ({_short(error)}). Start one with "
                "'ray start --head', name its address with --address, or use --launcher pool. Nothing was lost."
            ) from None
        return ray

    def _result(self, ray: Any, future: Any) -> dict[str, Result]:
        try:
            cells: dict[str, Result] = ray.get(future)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.WorkerCrashedError:
            raise
        except ray.exceptions.RayError as error:
            raise LaunchError(f"A cell was lost ({_short(error)}). Finished cells are kept.") from None
        return cells

    def _again(self, order: "Order", error: Exception) -> "Order":
        """Ray does not say by which signal a worker died: exact compute settings are tried before giving up."""
        why = f"A cell's worker died {PATIENCE + 1} times ({_short(error)})"
        if order.exact:
            raise LaunchError(f"{why}, with exact compute settings as well. Finished cells are kept.") from None
        log.warning("%s; its cell is done again with exact compute settings.", why)
        return replace(order, exact=True)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _require_listening(address: str) -> None:
    """`OSError` where nothing listens at `HOST:PORT`, for which Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()
