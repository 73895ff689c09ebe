"""Cells that are done together: students of one architecture are trained in the same steps (`Stack`)."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from undistill.auditing.cell import Job, Result
from undistill.core.progress import Progress
from undistill.training.fit import Suspended
from undistill.training.loop import Loop
from undistill.training.stack import Unstackable, kind, stack_of

log = logging.getLogger(__name__)


def grouped(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs whose students may be trained in the same steps, at most `most` together; each key stands there once."""
    alike: dict[object, dict[str, Job]] = {}
    for job in jobs:
        form = id(job.pair), job.kind, str(job.student), job.schedule.epochs, job.schedule.batch_size
        alike.setdefault(form, {}).setdefault(job.key, job)
    groups = [list(group.values()) for group in alike.values()]
    return [group[first : first + most] for group in groups for first in range(0, len(group), most)]


def run_together(
    jobs: Sequence[Job], cells: Path, progress: Progress, *, exact: bool = False, tries: bool = False
) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, as soon as it is there. With `tries`, students are stacked only where a trial says so.

    An attack runs until it trains a student, which is left to a stack; run again, it finds the student's checkpoint and
    goes on, like one that was killed. What cannot be stacked is trained alone.
    """
    alone, left = {job.key for job in jobs if exact or len(jobs) == 1}, list(jobs)
    while left:
        waiting: list[tuple[Job, Loop]] = []
        for job in left:
            try:
                yield job, job.run(cells, progress, exact=exact, suspends=job.key not in alone)
            except Suspended as suspended:
                waiting.append((job, suspended.loop))
        left = [job for job, _ in waiting]
        alone |= _trained_alone(waiting, progress, tries)


def _trained_alone(waiting: Sequence[tuple[Job, Loop]], progress: Progress, tries: bool) -> set[str]:
    """Train the students that wait, in stacks; keys of the jobs whose students must be trained alone."""
    alone: set[str] = set()
    kinds: dict[str, list[tuple[Job, Loop]]] = {}
    for job, loop in waiting:
        kinds.setdefault(kind(loop), []).append((job, loop))
    for text, alike in kinds.items():
        loops = [loop for _, loop in alike]
        try:
            if not text or len(loops) == 1:
                raise Unstackable(loops, "There is no other student like it.")
            stack = stack_of(loops)
            if tries:
                stack.require_gain()
            stack.train(progress)
        except Unstackable as error:
            failed = {job.key: job for job, loop in alike if loop in error.loops}
            log.info("%s: trained alone. %s", ", ".join(job.name for job in failed.values()), error)
            alone |= failed.keys()
    return alone
