"""`Order`: what a worker process is told to do, and how it does it."""

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from undistill.auditing.cell import Job, Result
from undistill.auditing.together import run_together
from undistill.core import code
from undistill.core.progress import Reporter
from undistill.data.official import VARIABLE, data_dir
from undistill.training.compute import keep_freed_memory


@dataclass(frozen=True)
class Order:
    """Order to a worker: jobs as bytes, to be read only after their code has been trusted."""

    jobs: bytes
    cells: Path
    threads: int
    cwd: Path
    data: Path
    trusted: tuple[str, ...]
    tries: bool = False
    """Whether students are stacked only where a trial shows that it pays."""
    on_gpu: bool = False
    exact: bool = False
    """Use exact compute settings, whatever the job asks for."""

    @classmethod
    def of(cls, jobs: Sequence[Job], cells: Path, threads: int, tries: bool = False) -> "Order":
        on_gpu = jobs[0].pair.options.device.type == "cuda"
        trusted = tuple(code.trusted())
        return cls(pickle.dumps(list(jobs)), cells.resolve(), threads, Path.cwd(), data_dir(), trusted, tries, on_gpu)


def perform(order: Order, number: int | None = None) -> dict[str, Result]:
    """The cells of an order by key, done in this worker, whose progress lies beside the first that is missing.

    `number` picks one of the GPUs.
    """
    if number is not None and order.on_gpu:
        torch.cuda.set_device(number % torch.cuda.device_count())
    os.chdir(order.cwd)
    os.environ[VARIABLE] = str(order.data)
    torch.set_num_threads(order.threads)
    keep_freed_memory()
    for reference in order.trusted:
        code.trust(reference)
    jobs: list[Job] = pickle.loads(order.jobs)
    first = next((job for job in jobs if not (order.cells / f"{job.key}.json").exists()), jobs[0])
    progress = Reporter(order.cells / first.key)
    done = run_together(jobs, order.cells, progress, exact=order.exact, tries=order.tries)
    return {job.key: result for job, result in done}
