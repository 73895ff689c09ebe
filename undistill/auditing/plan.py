"""Every cell of an audit: attack x student x seed, against the victim and its honest twin."""

from collections.abc import Iterator, Sequence

from undistill.attacks.attack import Attack
from undistill.auditing.cell import Job
from undistill.auditing.pair import VictimPair
from undistill.auditing.schema import Side
from undistill.auditing.suites import find_suite
from undistill.models.model import Model
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Access


def plan(
    pairs: Sequence[VictimPair],
    suite: str,
    attacks: Sequence[str | Attack],
    students: Sequence[str | Model],
    recipe: Recipe,
    budget: int | None = None,
) -> Iterator[Job]:
    """Every cell of the audit; an attack that asks nobody runs once for both sides."""
    chosen = find_suite(suite)
    parsed = dict.fromkeys(Attack.from_user(attack) for attack in [*chosen.attacks, *attacks])
    networks = dict.fromkeys(Model.from_user(student) for student in students or chosen.students)
    for pair in pairs:
        for seed in pair.seeds:
            for student in networks:
                for attack in parsed:
                    sides: tuple[Side, ...] = ("none",) if attack.needs == Access.NONE else ("victim", "honest")
                    for side in sides:
                        yield Job(pair, side, attack, student, seed, recipe, budget)
