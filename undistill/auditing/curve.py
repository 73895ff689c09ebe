"""How good a copy so many queries buy: for every budget a fresh student, trained on what was bought so far."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from undistill.attacks.attack import QueryAttack, Role, bought_once
from undistill.auditing.cell import Job
from undistill.auditing.plan import CURVE_FLOORS, Plan
from undistill.auditing.schema import Cell, Report, Side
from undistill.training.recipe import Recipe

GAPS = (0.10, 0.05, 0.02)
"""Differences of accuracy from the victim, within which a copy is worth knowing of."""
MOST_EPOCHS = 1_000_000


def budgets(images: int) -> list[int]:
    """100, 300, 1,000, 3,000, ... and as many as there are images."""
    steps = [one * 10**power for power in range(2, 12) for one in (1, 3)]
    return [*(count for count in steps if count < images), images]


def curve_jobs(plan: Plan, best: Sequence[Job], attack: str, student: str) -> list[Job]:
    """The cells of a curve: a thief against both sides, and the floors of whoever takes labels, at every budget.

    Each buys the answer to an image once, and trains for as many steps as with all images, with the settings of the
    `best` jobs, one for each that the plan searched.
    """
    pair, tuned = plan.jobs[0].pair, {listed.column: job for listed, job in zip(plan.searched, best, strict=True)}
    images, name = len(pair.attackers.train), named_or_plain(plan, attack, student)
    columns: list[tuple[Side, str, str]] = [(side, name, student) for side in pair.sides]
    return [
        replace(at_budget(tuned[column], budget, images), seed=seed, listed=column[1])
        for budget in budgets(images)
        for column in [*columns, *(("victim", floor, student) for floor in CURVE_FLOORS)]
        for seed in pair.seeds
        if affordable(tuned[column], budget) > 1
    ]


def affordable(job: Job, budget: int) -> int:
    """How many images that budget buys to a thief who buys each answer once."""
    return budget // bought_once(job.attack).queries_per_image(job.recipe)


def at_budget(job: Job, budget: int, images: int) -> Job:
    """The job of a thief who buys one answer for each of `budget` of his `images`."""
    attack, recipe = bought_once(job.attack), job.recipe
    if not attack.passes_over_spare:
        recipe = stretched(recipe, images / affordable(job, budget))
    return replace(job, attack=attack, recipe=recipe, budget=budget)


def stretched(recipe: Recipe, by: float) -> Recipe:
    return recipe.model_copy(update={"epochs": min(math.ceil(by * recipe.epochs), MOST_EPOCHS)})


def named_or_plain(plan: Plan, attack: str, student: str) -> str:
    """That attack, or the first plain one where it does not ask for the thief's own images."""
    asks = {
        str(job.attack): job.attack.role
        for job in plan.searched
        if job.side == "victim" and str(job.student) == student and isinstance(job.attack, QueryAttack)
    }
    return attack if attack in asks else next(name for name, role in asks.items() if role == Role.PLAIN)


@dataclass(frozen=True)
class Points:
    """Mean accuracy and fidelity of one thief at every budget."""

    side: Side
    attack: str
    cells: dict[int, list[Cell]]
    """By queries."""

    @property
    def accuracy(self) -> dict[int, float]:
        return {queries: statistics.fmean(cell.accuracy for cell in found) for queries, found in self.cells.items()}


def lines(curve: Sequence[Cell]) -> list[Points]:
    """The lines of a curve, one for each thief and side."""
    found: dict[tuple[Side, str], dict[int, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in curve:
        found[cell.column[:2]][cell.budget or cell.queries].append(cell)
    return [Points(side, attack, dict(sorted(cells.items()))) for (side, attack), cells in found.items()]


def harmless(report: Report) -> int | None:
    """The most queries of the curve, up to which every copy was worse than the model by more than the first of `GAPS`.

    None without a curve; 0 where even the fewest bought a better copy.
    """
    reached = _reached(report)
    enough = queries_within(report).get(f"{GAPS[0]:g}", math.inf)
    return max((queries for queries in reached if queries < enough), default=0) if reached else None


def _reached(report: Report) -> dict[int, float]:
    """Accuracy of the best copy by queries."""
    reached: dict[int, float] = {}
    for line in lines(report.curve):
        if line.side == "victim":
            for queries, accuracy in line.accuracy.items():
                reached[queries] = max(reached.get(queries, 0.0), accuracy)
    return reached


def queries_within(report: Report) -> dict[str, int]:
    """The fewest queries that bought a copy within each of `GAPS`, by the curve; a gap that none reached is absent."""
    reached, found = _reached(report), {}
    for gap in GAPS:
        enough = [queries for queries, accuracy in reached.items() if accuracy >= report.victim.accuracy - gap]
        if enough:
            found[f"{gap:g}"] = min(enough)
    return found


def price_of_a_copy(report: Report) -> str:
    """How many queries buy a copy within each of `GAPS` of the victim, by the best thief at each budget."""
    best: dict[int, list[Cell]] = {}
    for line in lines(report.curve):
        for queries, cells in line.cells.items() if line.side == "victim" else ():
            if queries not in best or _validated(cells) > _validated(best[queries]):
                best[queries] = cells
    counts: list[tuple[float, int | None]] = []
    for gap in GAPS:
        wanted = report.victim.accuracy - gap
        enough = [n for n, cells in best.items() if statistics.fmean(cell.accuracy for cell in cells) >= wanted]
        if counts and enough and counts[-1][1] == min(enough):  # which is the nearer copy for as many
            counts.pop()
        counts.append((gap, min(enough, default=None)))
        if not enough:
            break
    said = [
        f"{f'{count:,} queries buy' if count else f'not even {max(best):,} queries buy'} a copy within {100 * gap:.0f} "
        "points of the protected model"
        for gap, count in counts
    ]
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."


def _validated(cells: Sequence[Cell]) -> float:
    return statistics.fmean(cell.validation for cell in cells)
