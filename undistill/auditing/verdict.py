"""From the cells to the verdict: worst case over attacks and students, with the spread over seeds.

`Verdict` in schema.py says what each value means, such as `leak_hard`.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from undistill.attacks.attack import FLOORS, Role, ThiefData
from undistill.auditing.predictions import predicted
from undistill.auditing.schema import Cell, Interval, Report, Side, Threat, Trial, Verdict
from undistill.auditing.statistics import crossed_interval, interval, least_spread, preferred
from undistill.auditing.wording import is_above_zero, sentence
from undistill.core.errors import SpecError

Column = tuple[Side, str, str]  # side, attack as it is listed, student
Accuracies = dict[int, float]  # by seed
Students = dict[int, Cell]  # by seed
EXAMPLES = {
    Role.NO_TEACHER: "Scratch()",
    Role.LABELS: "LabelSmoothing()",
    Role.TOP_ANSWERS: "HardLabels()",
    Role.PLAIN: "SoftLabels()",
}


def columns(cells: Iterable[Cell]) -> dict[Column, Accuracies]:
    """Accuracies by seed for every (side, attack, student)."""
    return {
        column: {seed: cell.accuracy for seed, cell in found.items()} for column, found in students_of(cells).items()
    }


def students_of(cells: Iterable[Cell]) -> dict[Column, Students]:
    """Cells by seed for every (side, attack, student)."""
    table: dict[Column, Students] = defaultdict(dict)
    for cell in cells:
        table[cell.column][cell.seed] = cell
    return dict(table)


@dataclass(frozen=True)
class Judge:
    """Compares students; what is worst or best is chosen by validation images, and then measured on test images.

    A maximum of test accuracies would count luck as leakage.
    """

    cells: Sequence[Cell]
    trials: Sequence[Trial]
    images: int
    """Test images on which accuracies were measured."""
    classes: int = 2
    labels: NDArray[np.int64] | None = None
    """Their labels (N,), where all students were measured on the same ones."""

    @classmethod
    def of(cls, report: Report) -> "Judge":
        """A judge of the students of a report, which holds no single answers of theirs."""
        return cls(report.cells, report.trials, report.pairs[0].test_images)

    @cached_property
    def table(self) -> dict[Column, Students]:
        return students_of(self.cells)

    @cached_property
    def scores(self) -> dict[Column, float]:
        """Validation accuracy by which a column is chosen: of the trial that was preferred, or of its students."""
        best = preferred_trials(self.trials)
        return {
            column: best[column].validation
            if column in best
            else statistics.fmean(cell.validation or cell.accuracy for cell in found.values())  # once there was none
            for column, found in self.table.items()
        }

    def of_role(self, roles: Sequence[Role], side: Side, student: str) -> list[Column]:
        """The attacks with one of these roles, in their order; `SpecError` where there is none."""
        found = [
            column
            for column, cells in self.table.items()
            if column[0] == side and column[2] == student and next(iter(cells.values())).role in roles
        ]
        if not found:
            raise SpecError(
                f"The audit has no attack of the role '{roles[0].value}' on side '{side}', beside which others are "
                f"read. {EXAMPLES[roles[0]]} is one."
            )
        return found

    def best(self, among: Iterable[Column]) -> Column:
        """The column whose students were best on validation images, the first of equal ones."""
        return max(among, key=lambda column: self.scores[column])

    def minus(self, a: Column, b: Column) -> Interval:
        """Accuracy of `a` minus that of `b`, paired by seed, and by image where all were measured on the same ones."""
        ours, theirs = self.table[a], self.table[b]
        seeds = sorted(ours.keys() & theirs.keys())
        if self.labels is not None and all(ours[seed].predictions and theirs[seed].predictions for seed in seeds):
            return crossed_interval(np.stack([self._right(ours[seed]) - self._right(theirs[seed]) for seed in seeds]))
        lost = [ours[seed].accuracy - theirs[seed].accuracy for seed in seeds]
        return interval(lost, least_spread(self.images))

    def _right(self, cell: Cell) -> NDArray[np.float64]:
        return np.asarray(predicted(cell.predictions, self.classes) == self.labels, dtype=float)

    @cached_property
    def asked(self) -> list[Column]:
        """Every attack of a thief on the victim, the copying of top answers among them."""
        return [column for column in self.table if column[0] == "victim" and self.role(column) != Role.BOUND]

    def accuracy(self, column: Column) -> Interval:
        """Test accuracy of the students of `column`, over seeds."""
        return interval([cell.accuracy for cell in self.table[column].values()], least_spread(self.images))

    @property
    def best_thief(self) -> Column:
        return self.best(self.asked)

    @property
    def best_of_answers(self) -> Column:
        """The best thief among those who have answers alone."""
        return self.best(column for column in self.asked if self.asks(column))

    def role(self, column: Column) -> Role:
        return next(iter(self.table[column].values())).role

    def asks(self, column: Column) -> bool:
        """Whether the thief has answers alone: what he gains beyond labels, answers gave away."""
        threat = self._threat(column)
        if threat is None:  # a cell of an earlier version
            return self.role(column) not in (Role.WHITE_BOX, Role.DATA_FREE)
        return threat.access == "answers"

    def has_labels(self, column: Column) -> bool:
        """Whether the thief has labels of his own, by which he may get further than by answers."""
        threat = self._threat(column)
        return threat is None or threat.data == ThiefData.LABELLED

    def floors(self, column: Column) -> list[Column]:
        """The students beside whom this thief is read: they got no more of an answer than its label."""
        return [self.hard(column[2]), *([self.labelled(column[2])] if self.has_labels(column) else [])]

    def leak(self, column: Column) -> Interval | None:
        """This thief's gain from answers beyond their labels; None where his floors had fewer images.

        For one with labels of his own, it is above zero only if he is ahead of both floors.
        """
        floors = self.floors(column)
        threats = [self._threat(one) for one in (column, *floors)]
        images = [threat.images for threat in threats if threat]
        if len(images) == len(threats) and min(images) < images[0]:
            return None
        ahead = [self.minus(column, floor) for floor in floors]
        by_luck = [one for one in ahead if not is_above_zero(one)]
        if by_luck:
            return min(by_luck, key=lambda one: one.mean if one.high is None else one.high)
        return min(ahead, key=lambda one: one.mean)

    def _threat(self, column: Column) -> Threat | None:
        return next(iter(self.table[column].values())).threat

    def hard(self, student: str) -> Column:
        """The floor of whoever can query: the better of those who take top answers alone."""
        return self.best(self.of_role((Role.TOP_ANSWERS, Role.SEMI_SUPERVISED), "victim", student))

    def labelled(self, student: str) -> Column:
        """The floor of whoever has labels."""
        self.of_role((Role.NO_TEACHER,), "none", student)
        return self.best(self.of_role((Role.LABELS, Role.NO_TEACHER), "none", student))

    @property
    def has_twin(self) -> bool:
        """Whether there are students of an honest twin."""
        return any(column[0] == "honest" for column in self.table)

    def verdict(self, cost: Interval | None, data: str, bits: float | None = None) -> Verdict:
        """The verdict over all cells. `SpecError` names a role that is lacking.

        Attacks are found by their role; of several plain ones the first counts. `cost` is None without a twin.
        """
        attacks = [column for column in self.asked if self.role(column) not in FLOORS and self.asks(column)]
        if not attacks:
            raise SpecError("The audit has no attack beside the floors; add one, such as SoftLabels(T=4, alpha=0.9).")
        worst = max(attacks, key=lambda column: self.scores[column] - self.scores[self.best(self.floors(column))])
        thief, students = self.best_thief, list(dict.fromkeys(column[2] for column in attacks))
        plain = {who: self.of_role((Role.PLAIN,), "victim", who)[0] for who in students}
        twin = {who: self.of_role((Role.PLAIN,), "honest", who)[0] for who in students} if self.has_twin else {}
        scratch = {who: self.of_role((Role.NO_TEACHER,), "none", who)[0] for who in students}

        def ahead(a: Mapping[str, Column], b: Mapping[str, Column]) -> Callable[[str], float]:
            return lambda who: self.scores[a[who]] - self.scores[b[who]]

        def gain(taught: Mapping[str, Column], who: str) -> Interval:
            return self.minus(taught[who], scratch[who])

        gains = max(students, key=ahead(plain, scratch))
        gains_honest = min(students, key=ahead(twin, scratch)) if twin else None
        spared = min(students, key=ahead(twin, plain)) if twin else None
        unharmed: Column = ("honest", *thief[1:])
        verdict = Verdict(
            sentence="",
            leak=self.leak(worst),
            leak_hard=self.minus(worst, self.hard(worst[2])),
            leak_label_smoothing=self.minus(worst, self.labelled(worst[2])),
            kd_gain=gain(plain, gains),
            kd_gain_honest=gain(twin, gains_honest) if gains_honest else None,
            damage=self.minus(twin[spared], plain[spared]) if spared else None,
            damage_best=self.minus(unharmed, thief) if unharmed in self.table else None,
            cost=cost,
            bits=bits,
            worst_attack=worst[1],
            worst_student=worst[2],
            best_attack=thief[1],
            best_student=thief[2],
        )
        words = sentence(verdict, data, self._thief_in_words(thief))
        return verdict.model_copy(update={"sentence": words})

    def _thief_in_words(self, column: Column) -> str:
        kinds = len({attack for _, attack, _ in self.asked})
        first = next(iter(self.table[column].values()))
        named = f"{first.attack}, tuned" if first.listed else first.attack
        how = "copying only the top answers" if self.role(column) == Role.TOP_ANSWERS else named
        accuracy = statistics.fmean(cell.accuracy for cell in self.table[column].values())
        return f"the best thief of {kinds} that were tried ({how}) gets a copy of {accuracy:.1%} accuracy"


def preferred_trials(trials: Iterable[Trial]) -> dict[Column, Trial]:
    """The trial with the setting that was measured afterwards, of each (side, attack, student)."""
    tried: dict[Column, list[Trial]] = defaultdict(list)
    for trial in trials:
        tried[trial.column].append(trial)
    return {column: own[preferred([trial.score for trial in own], own[0].images)] for column, own in tried.items()}


def best_thief(report: Report) -> Column:
    """The attack on the victim that made the best student on validation images."""
    return Judge.of(report).best_thief


def adapts(report: Report) -> bool:
    """Whether thieves tuned attacks that were made against defences."""
    against = {cell.column for cell in report.cells if cell.side == "victim" and cell.role not in (*FLOORS, Role.PLAIN)}
    tried = [trial.column for trial in report.trials if trial.column in against]
    return len(tried) > len(set(tried)) > 0
