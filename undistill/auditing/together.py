"""Cells that are done together: students of one architecture are trained in the same steps (`Stack`)."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from undistill.auditing.cell import Job, Result
from undistill.core.progress import Progress
from undistill.training.fit import Suspended
from undistill.training.loop import Loop
from undistill.training.stack import Unstackable, alone_if_it_fails, kind, stack_of, why_alone

log = logging.getLogger(__name__)


def grouped(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs whose students may be trained in the same steps, at most `most` together; each key stands there once."""
    unique: dict[str, Job] = {}
    for job in jobs:
        unique.setdefault(job.key, job)
    alike: dict[object, list[Job]] = {}
    for job in unique.values():
        form = id(job.pair), job.kind, str(job.student), job.schedule.epochs, job.schedule.batch_size
        alike.setdefault(form, []).append(job)
    return [group[first : first + most] for group in alike.values() for first in range(0, len(group), most)]


def run_together(
    jobs: Sequence[Job], cells: Path, progress: Progress, *, exact: bool = False, tries: bool = False
) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, as soon as it is there. With `tries`, students are stacked only where a trial says so.

    An attack runs until it trains a student, which is left to a stack; run again, it finds the student's checkpoint and
    goes on, like one that was killed. What cannot be stacked is trained alone.
    """
    alone, left = {job.key for job in jobs if exact or len(jobs) == 1}, list(jobs)
    trained: dict[str, Path | None] = {}
    """Checkpoint of the latest student of each job that a stack has trained to the end."""
    while left:
        waiting: list[Waiting] = []
        for job in left:
            try:
                yield job, job.run(cells, progress, exact=exact, suspends=job.key not in alone)
            except Suspended as suspended:
                waiting.append(Waiting(job, suspended.loop))
        left = [one.job for one in waiting]
        if unkept := {one.job.key for one in waiting if trained.get(one.job.key, ANY) == one.loop.checkpoint}:
            alone |= unkept  # its checkpoint was not written, or is not taken for its own
            continue
        for alike in _by_kind(waiting):
            failed = _train(alike, progress, tries)
            alone |= failed
            trained |= {one.job.key: one.loop.checkpoint for one in alike if not failed}


ANY = object()


class Waiting(NamedTuple):
    """A job whose student waits to be trained."""

    job: Job
    loop: Loop


def _by_kind(waiting: Sequence[Waiting]) -> Iterable[list[Waiting]]:
    kinds: dict[str, list[Waiting]] = {}
    for one in waiting:
        kinds.setdefault(why_alone(one.loop) or kind(one.loop), []).append(one)
    return kinds.values()


def _train(alike: Sequence[Waiting], progress: Progress, tries: bool) -> set[str]:
    """Train students of one kind in a stack; keys of the jobs whose students must be trained alone, if any."""
    loops = [one.loop for one in alike]
    try:
        if why := why_alone(loops[0]) or ("There is no other student like it." if len(loops) == 1 else ""):
            raise Unstackable(loops, why)
        with alone_if_it_fails(loops):
            stack = stack_of(loops)
            if tries:
                stack.require_gain()
            stack.train(progress)
    except Unstackable as error:
        failed = [one.job for one in alike if one.loop in error.loops]
        log.info("%s: trained alone. %s", ", ".join(job.name for job in failed), error)
        return {job.key for job in failed}
    return set()
