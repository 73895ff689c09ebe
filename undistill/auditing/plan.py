"""The plan of an audit: which students are trained, and how hard their thieves tune before."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from undistill.attacks.attack import Attack, Role, bought_once
from undistill.auditing.cell import Job
from undistill.auditing.pair import VictimPair
from undistill.auditing.schema import Side
from undistill.auditing.suites import Tuning, find_suite
from undistill.core.errors import Unsuitable
from undistill.models.model import Model
from undistill.runs.contact import Contact
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Access

CURVE_FLOORS = ("HardLabels(once=True)", "FixMatch(threshold=0.95, mu=7, weight=1)")
"""Attacks of whoever takes labels alone, beside which a curve is read."""


@dataclass(frozen=True)
class Plan:
    """Every cell of an audit, attack x student x seed, against the victim and its honest twin."""

    suite: str
    tuning: Tuning
    jobs: tuple[Job, ...]
    budget: int | None = None
    """The most queries of each thief."""
    curve: bool = False
    """Whether students of several budgets are trained, too."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Attacks of the suite that cannot be tried on these networks, and why."""

    @classmethod
    def of(
        cls,
        pairs: Sequence[VictimPair],
        suite: str,
        attacks: Sequence[str | Attack],
        students: Sequence[str | Model],
        recipe: Recipe,
        budget: int | None = None,
        tuning: Tuning | None = None,
        curve: bool = False,
    ) -> "Plan":
        """The suite's cells and those of more `attacks`; an attack that asks nobody runs once for both sides.

        Under a budget, who asks nobody has as many images as the first plain thief can buy answers for.
        """
        chosen = find_suite(suite)
        parsed = dict.fromkeys(Attack.from_user(attack) for attack in [*chosen.attacks, *attacks])
        if any(isinstance(pair.victim, Contact) and not pair.victim.spec.any_image for pair in pairs):
            parsed = dict.fromkeys(map(bought_once, parsed))  # no view of an image was recorded
        networks = dict.fromkeys(Model.from_user(student) for student in students or chosen.students)
        plain = next((attack for attack in parsed if attack.role == Role.PLAIN), None)
        own = budget // max(plain.queries_per_image(recipe), 1) if budget and plain else budget
        jobs = [
            Job(pair, side, attack, student, seed, recipe, budget if attack.needs else own)
            for pair in pairs
            for seed in pair.seeds
            for student in networks
            for attack in parsed
            for side in sides_of(attack, pair)
        ]
        return cls(suite, tuning or chosen.tuning, tuple(jobs), budget, curve)

    def possible(self, named: Collection[Attack]) -> "Plan":
        """The plan without what the suite lists and these networks do not allow; what the user `named` is refused.

        Errors say what cannot be tried, before anything is trained.
        """
        why: dict[tuple[Attack, Model], str] = {}
        for job in self.jobs:
            try:
                job.check()
            except Unsuitable as error:
                if job.attack in named:
                    raise
                why[job.attack, job.student] = str(error)
        jobs = tuple(job for job in self.jobs if (job.attack, job.student) not in why)
        skipped = {f"{attack} by {student}": reason for (attack, student), reason in why.items()}
        return replace(self, jobs=jobs, skipped=skipped)

    @property
    def searched(self) -> list[Job]:
        """One job for each attack, side and student, those of a curve's floors among them: what thieves tune.

        On the first pair.
        """
        first: dict[object, Job] = {}
        for job in [*self.jobs, *self._curve_floors]:
            first.setdefault(job.column, job)
        return list(first.values())

    @property
    def _curve_floors(self) -> list[Job]:
        first, floors = self.jobs[0], [Attack.parse(text) for text in CURVE_FLOORS if self.curve]
        students = dict.fromkeys(job.student for job in self.jobs)
        return [
            replace(first, side="victim", attack=floor, student=student, budget=self.budget)
            for floor in floors
            for student in students
        ]

    def tuned(self, best: Sequence[Job]) -> list[Job]:
        """All jobs, with the settings of the `best` job of each attack, side and student."""
        found = {listed.column: job for listed, job in zip(self.searched, best, strict=True)}
        return [
            replace(job, attack=chosen.attack, recipe=chosen.recipe, listed=chosen.listed)
            for job in self.jobs
            if (chosen := found[job.column])
        ]


def sides_of(attack: Attack, pair: VictimPair) -> tuple[Side, ...]:
    return ("none",) if attack.needs == Access.NONE else pair.sides
