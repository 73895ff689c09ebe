"""How good a copy so many queries buy: for every budget a fresh student, trained on what was bought so far."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from undistill.attacks.attack import Attack, QueryAttack, Role
from undistill.auditing.cell import Job
from undistill.auditing.plan import Plan
from undistill.auditing.schema import Cell, Report, Side
from undistill.training.recipe import Recipe

FLOORS = ("HardLabels(once=True)", "FixMatch(threshold=0.95, mu=7, weight=1)")
WITHIN = (0.05, 0.02)
"""How far below the victim a copy may be that is worth having."""
MOST_EPOCHS = 1_000_000


def budgets(images: int) -> list[int]:
    """100, 300, 1,000, 3,000, ... and as many as there are images."""
    steps = [one * 10**power for power in range(2, 12) for one in (1, 3)]
    return [*(count for count in steps if count < images), images]


def curve_jobs(plan: Plan, thief: Job) -> list[Job]:
    """The cells of a curve: `thief` against both sides, and the floors of whoever takes labels, at every budget.

    Each buys one answer for each image, and trains for as many steps as with all images.
    """
    pair = plan.jobs[0].pair
    images = len(pair.attackers.train)
    attacks: list[tuple[Attack, Recipe, tuple[Side, ...]]] = [
        (bought_once(thief.attack), thief.recipe, ("victim", "honest")),
        *((Attack.parse(text), plan.jobs[0].recipe, ("victim",)) for text in FLOORS),
    ]
    return [
        replace(
            plan.jobs[0],
            side=side,
            attack=attack,
            recipe=recipe if attack.passes_over_spare else stretched(recipe, images / budget),
            student=thief.student,
            seed=seed,
            budget=budget,
            listed="",
        )
        for budget in budgets(images)
        for attack, recipe, sides in attacks
        for side in sides
        for seed in pair.seeds
    ]


def bought_once(attack: Attack) -> Attack:
    """The attack of a thief who buys each answer once."""
    return attack.model_copy(update={"once": True}) if isinstance(attack, QueryAttack) else attack


def stretched(recipe: Recipe, by: float) -> Recipe:
    return recipe.model_copy(update={"epochs": min(math.ceil(by * recipe.epochs), MOST_EPOCHS)})


def thief_of(plan: Plan, best: Sequence[Job], attack: str, student: str) -> Job:
    """The tuned job of an attack on the victim; the first plain one where that attack does not ask for its images."""
    asks = [
        (str(listed.attack), job)
        for listed, job in zip(plan.searched, best, strict=True)
        if job.side == "victim" and str(job.student) == student and isinstance(job.attack, QueryAttack)
    ]
    named = [job for text, job in asks if text == attack]
    plain = [job for _, job in asks if job.attack.role == Role.PLAIN]
    return (named or plain)[0]


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
        found[cell.side, cell.attack][cell.budget or cell.queries].append(cell)
    return [Points(side, attack, dict(sorted(cells.items()))) for (side, attack), cells in found.items()]


def price_of_a_copy(report: Report) -> str:
    """How many queries buy a copy within 5 and within 2 points of the victim, by the best thief at each budget."""
    best: dict[int, list[Cell]] = {}
    for line in lines(report.curve):
        for queries, cells in line.cells.items() if line.side == "victim" else ():
            if queries not in best or _validated(cells) > _validated(best[queries]):
                best[queries] = cells
    said = []
    for gap in WITHIN:
        wanted = report.victim.accuracy - gap
        enough = [n for n, cells in best.items() if statistics.fmean(cell.accuracy for cell in cells) >= wanted]
        bought = f"{min(enough):,} queries buy" if enough else f"not even {max(best):,} queries buy"
        said.append(f"{bought} a copy within {100 * gap:.0f} points of the protected model")
    return f"{said[0][0].upper()}{said[0][1:]}; {said[1]}."


def _validated(cells: Sequence[Cell]) -> float:
    return statistics.fmean(cell.validation for cell in cells)
