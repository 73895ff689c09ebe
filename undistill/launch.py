"""`Launcher`: where the cells of an audit are done. Every launcher gives the same cells."""

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from undistill import code
from undistill.cells import Job
from undistill.data.official import VARIABLE, data_dir
from undistill.engine import keep_freed_memory
from undistill.errors import LaunchError
from undistill.progress import Board, Progress, Reporter
from undistill.report.schema import Cell
from undistill.spec import Spec

POLL = 0.5  # seconds between two looks at the workers
PATIENCE = 3  # how often in a row all workers may be lost without a cell in between


class Launcher(Spec):
    """Lost workers' cells are done again; a cell that fails ends the audit, and finished cells are kept."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], cells: Path, progress: Progress) -> list[Cell]:
        """The cell of every job, in the jobs' order; `cells` is a folder that all processes share."""


class Serial(Launcher):
    """In this process, one after the other."""

    def run(self, jobs: Sequence[Job], cells: Path, progress: Progress) -> list[Cell]:
        done = []
        with progress.task("audit", len(jobs)) as task:
            for job in jobs:
                done.append(job.run(cells, progress))
                task.advance()
        return done


class Pool(Launcher):
    """In `workers` processes on this machine, which share its cores; on GPUs, one for each in turn."""

    workers: int = Field(2, ge=1, le=512)
    threads: int = Field(0, ge=0)
    """Of each worker; 0 divides the cores."""

    def run(self, jobs: Sequence[Job], cells: Path, progress: Progress) -> list[Cell]:
        orders = {job.key: Order.of(job, cells, self._threads()) for job in jobs}
        done: dict[str, Cell] = {}
        lost = 0
        with progress.task("audit", len(orders)) as task, Board(progress, cells) as board:
            while len(done) < len(orders):
                before = len(done)
                try:
                    with self._executor() as executor:
                        todo = {executor.submit(perform, orders[key]): key for key in orders if key not in done}
                        while todo:
                            finished, _ = wait(todo, POLL, FIRST_COMPLETED)
                            for future in finished:
                                done[todo.pop(future)] = future.result()
                                task.advance()
                            board.look()
                except BrokenProcessPool:
                    lost = lost + 1 if len(done) == before else 0
                    if lost == PATIENCE:
                        raise LaunchError(
                            f"Workers died {lost} times in a row, most likely for lack of memory; use fewer: "
                            f"Pool(workers={max(self.workers - 1, 1)}). A script of your own must call audit() below "
                            "if __name__ == '__main__':, or its workers run it again. Finished cells are kept."
                        ) from None
        return [done[job.key] for job in jobs]

    def _threads(self) -> int:
        return self.threads or max(torch.get_num_threads() // self.workers, 1)

    @contextmanager
    def _executor(self) -> Iterator[ProcessPoolExecutor]:
        """An executor whose workers do not outlive this block, however it is left."""
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        executor = ProcessPoolExecutor(self.workers, context, _start_worker, (context.Value("i", 0),))
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
        executor.shutdown()


class Ray(Launcher):
    """On a Ray cluster whose machines share the folders of this one; needs `pip install undistill[ray]`."""

    address: str = "auto"
    """`auto` finds the cluster of this machine; `local` starts one; else `HOST:PORT` or `ray://HOST:PORT`."""
    cpus: float = Field(1.0, gt=0)
    """Of each cell, which computes with as many threads."""
    gpus: float = Field(0.0, ge=0)

    def run(self, jobs: Sequence[Job], cells: Path, progress: Progress) -> list[Cell]:
        if any(job.subject.asking.device.type == "cuda" for job in jobs) and not self.gpus:
            raise LaunchError(
                "The cells compute on a GPU, and Ray gives them none: --launcher 'Ray(gpus=1)', or a share of one; "
                "or --device cpu."
            )
        ray = self._connect()
        remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=PATIENCE)(perform)
        orders = {job.key: Order.of(job, cells, max(int(self.cpus), 1)) for job in jobs}
        done: dict[str, Cell] = {}
        try:
            with progress.task("audit", len(orders)) as task, Board(progress, cells) as board:
                todo = {remote.remote(order): key for key, order in orders.items()}
                while todo:
                    finished, _ = ray.wait(list(todo), timeout=POLL)
                    for future in finished:
                        done[todo.pop(future)] = self._result(ray, future)
                        task.advance()
                    board.look()
        finally:
            ray.shutdown()
        return [done[job.key] for job in jobs]

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
                f"No Ray cluster answers at '{self.address}' ({' '.join(str(error).split())[:200]}). Start one with "
                "'ray start --head', name its address with --address, or use --launcher pool. Nothing was lost."
            ) from None
        return ray

    def _result(self, ray: Any, future: Any) -> Cell:
        try:
            cell: Cell = ray.get(future)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise LaunchError(
                f"A cell's worker died {PATIENCE + 1} times ({' '.join(str(error).split())[:200]}). "
                "Finished cells are kept."
            ) from None
        return cell


def _require_listening(address: str) -> None:
    """`OSError` where nothing listens at `HOST:PORT`, for which Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


@dataclass(frozen=True)
class Order:
    """What a worker is told: a job as bytes, to be read only after its code has been trusted."""

    job: bytes
    cells: Path
    threads: int
    cwd: Path
    data: Path
    trusted: tuple[str, ...]

    @classmethod
    def of(cls, job: Job, cells: Path, threads: int) -> "Order":
        return cls(pickle.dumps(job), cells.resolve(), threads, Path.cwd(), data_dir(), tuple(code.trusted()))


def perform(order: Order) -> Cell:
    """Do a cell in this worker; what it says of its progress lies beside it."""
    os.chdir(order.cwd)
    os.environ[VARIABLE] = str(order.data)
    torch.set_num_threads(order.threads)
    keep_freed_memory()
    for reference in order.trusted:
        code.trust(reference)
    job: Job = pickle.loads(order.job)
    return job.run(order.cells, Reporter(order.cells / job.key))


def _start_worker(counter: Any) -> None:
    """Ctrl-C is the parent's business; each worker takes the next GPU, and does not outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if count := torch.cuda.device_count():
        torch.cuda.set_device(number % count)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
