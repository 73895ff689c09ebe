"""The plan of an audit in words, and a forecast of how long it takes."""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from undistill.attacks.adaptive.query_smoothing import QuerySmoothing
from undistill.attacks.attack import Buying, QueryAttack, ThiefData
from undistill.attacks.labels.fix_match import FixMatch
from undistill.auditing.cell import Job
from undistill.auditing.curve import curve_jobs
from undistill.auditing.launchers import unfinished
from undistill.auditing.plan import Plan
from undistill.auditing.students import Students
from undistill.auditing.tuning import trial_of
from undistill.core.progress import duration
from undistill.core.seeds import derive
from undistill.data.split import Split
from undistill.runs.contact import MOST_LOOKED
from undistill.training.answers import ASKED
from undistill.training.compute import EXACT
from undistill.training.fit import Fit
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Access, Oracle

BATCHES, ON_GPU = 4, 64  # of a trial's epoch; on a GPU enough to replay most of them
EPOCHS = 2  # of each training in a trial, of which the second is timed


@dataclass
class Forecast:
    """How long trainings take one after another, by a trial of each kind of them."""

    seconds: float = 0.0
    untried: set[str] = field(default_factory=set)
    """Attacks that make their own images: their trial would take as long as they do."""

    def __str__(self) -> str:
        without = f", without {', '.join(sorted(self.untried))}" if self.untried else ""
        return f"That takes {duration(self.seconds)} on this machine, one after another{without}; by a trial of each."


def describe(plan: Plan, cells: Path) -> str:
    """The students of an audit, as a sentence: how many, by which attacks, for how many epochs."""
    jobs, tuning, curve = plan.jobs, plan.tuning, _likely_curve(plan)
    todo, recipe = unfinished(jobs, cells), jobs[0].recipe
    attacks = list(dict.fromkeys(job.attack for job in jobs))
    names = ", ".join(dict.fromkeys(type(attack).__name__ for attack in attacks))
    students, seeds = len({job.student for job in jobs}), len({job.seed for job in jobs})
    keys = {job.key for job in jobs}
    kept = f" ({len(keys) - len(todo)} of {len(keys)} are there)" if len(todo) < len(keys) else ""
    batches = max(math.ceil(len(job.data.train) / recipe.batch_size) for job in jobs)
    left_out = ", ".join(dict.fromkeys(name.partition("(")[0] for name in plan.skipped))
    most = "at most " if jobs[0].budget else ""
    twin = jobs[0].pair.honest is not None
    sides = "on the protected model and on its unprotected twin" if twin else "on one model, without a twin"
    return (
        f"Plan: {count(len(todo), 'student')} to train{kept}, each for {count(recipe.epochs, 'epoch')} of "
        f"{most}{count(batches, 'batch', 'batches')}: {count(len(attacks), 'attack')} ({names}) x "
        f"{count(students, 'network')} x {count(seeds, 'seed')}, {sides}. "
        f"Before, each thief tries {count(tuning.trials, 'setting')} for {tuning.share:.0%} of the epochs."
        + (f" Not every network allows {left_out}; the report says why." if left_out else "")
        + (f" The curve takes {count(len(curve), 'more student', 'more students')}." if curve else "")
    )


def forecast(plan: Plan, cells: Path) -> Forecast:
    """A forecast for the unfinished students of an audit, from a short training of each attack."""
    tuning, found = plan.tuning, Forecast()
    trials = [trial_of(job, tuning.share) for job in plan.searched]
    jobs = [*plan.jobs, *_likely_curve(plan)]
    todo = unfinished([*jobs, *trials], cells)
    rates: dict[object, float] = {}
    for job, trainings in [*((job, 1.0) for job in jobs), *((job, tuning.trials * tuning.share) for job in trials)]:
        if job.key not in todo:
            continue
        todo.remove(job.key)
        if job.attack.data == ThiefData.NONE:
            found.untried.add(type(job.attack).__name__)
            continue
        kind = job.attack, job.student, job.recipe, job.budget
        if kind not in rates:
            rates[kind] = _seconds(job)
        found.seconds += trainings * rates[kind]
    return found


def queries(plan: Plan, cells: Path) -> int:
    """At most how many answers have to be bought of a black box for what is unfinished, those for measuring included.

    Thieves who ask about the same views of the same images share their answers.
    """
    trials = [trial_of(job, plan.tuning.share) for job in plan.searched]
    jobs, pair = [*plan.jobs, *_likely_curve(plan), *trials], plan.jobs[0].pair
    repeatable = pair.victims["victim"].repeatable
    todo, bought = unfinished(jobs, cells), Counter[object]()
    for job in jobs:
        if job.key not in todo or job.side != "victim" or job.attack.needs != Access.QUERY:
            continue
        data, once = job.data, job.attack.buys == Buying.ONCE
        asked = len(data.train) * job.attack.queries_per_image(job.schedule)
        if job.attack.buys == Buying.CHOSEN or not (repeatable and isinstance(job.attack, QueryAttack | FixMatch)):
            tried = plan.tuning.trials if job in trials else 1
            bought[job.key] = tried * (asked if job.budget is None else job.budget)
        else:  # other views than those of a training are asked by QuerySmoothing alone
            own = str(job.attack) if isinstance(job.attack, QuerySmoothing) else ""
            shared = data.train.image_digest, once, own
            bought[shared] = max(bought[shared], asked)
    times = 1 if repeatable else ASKED
    measured = [times * len(pair.data.test), MOST_LOOKED]
    if pair.honest:
        measured.append(times * len(pair.data.validation))
    if any(job.attack.needs and job.attack.data != ThiefData.LABELLED for job in trials):
        measured.append(times * len(pair.attackers.validation))
    return bought.total() + sum(measured)


def _likely_curve(plan: Plan) -> list[Job]:
    """The students of the curve by a plain thief; who will be the worst one is not known yet."""
    return curve_jobs(plan, plan.searched, "", str(plan.jobs[0].student)) if plan.curve else []


def _seconds(job: Job) -> float:
    pair, data = job.pair, job.data
    students = Students(job.student, pair.data.shape, pair.data.num_classes, job.seed)
    if job.attack.passes_over_spare:
        data = replace(data, train=data.everything, spare=None)

    network = pair.network(job.side) or Silent(pair.data.num_classes)

    def train(data: Split, fit: Fit) -> None:
        job.attack.run(Oracle(network, job.attack.needs), students, data, fit)

    return seconds_of(train, data, job.recipe, pair.options.device)


class Silent(nn.Module):
    """Answers for a black box, which a forecast does not ask: all classes are as likely."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), self.num_classes, device=images.device)


def seconds_of(train: Callable[[Split, Fit], object], data: Split, recipe: Recipe, device: torch.device) -> float:
    """Seconds of a training by `recipe`, from a trial of two epochs on a few batches.

    The trial computes exactly where the recipe leaves its compute settings to a trial of its own.
    """
    few = (ON_GPU if device.type == "cuda" else BATCHES) * recipe.batch_size
    short = replace(data.some(few, 0), spare=None)
    validation = data.validation[torch.arange(min(len(data.validation), few))]
    compute = EXACT if "auto" in str(recipe.compute) else recipe.compute
    fit = Fit(recipe.model_copy(update={"epochs": EPOCHS, "compute": compute}), derive(0, "forecast"), device)
    began = time.perf_counter()
    train(replace(short, validation=validation), fit)
    timed = sum(epoch["seconds"] for epoch in fit.history[1::EPOCHS])
    epoch = timed or (time.perf_counter() - began) / EPOCHS
    return epoch * recipe.epochs * len(data.train) / len(short.train)


def count(number: int, one: str, many: str = "") -> str:
    """'1 batch', '3 batches'."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
