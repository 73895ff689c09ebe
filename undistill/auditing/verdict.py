"""From the cells to the verdict: worst case over attacks and students, with the spread over seeds.

`Verdict` in schema.py says what each value means, such as `leak_hard`.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from undistill.attacks.attack import FLOORS, Role
from undistill.auditing.schema import Cell, Interval, Side, Verdict
from undistill.auditing.wording import quantile, sentence
from undistill.core.errors import SpecError

Column = tuple[Side, str, str]  # side, attack, student
Accuracies = dict[int, float]  # by seed
EXAMPLES = {
    Role.NO_TEACHER: "Scratch()",
    Role.LABELS: "LabelSmoothing()",
    Role.TOP_ANSWERS: "HardLabels()",
    Role.PLAIN: "SoftLabels()",
}


def interval(values: Sequence[float], least: float = 0.0) -> Interval:
    """Mean and 95 % t interval. Values that are counted on few images may agree by luck: their spread is `least`."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n)
    half = quantile(0.975, n - 1) * max(statistics.stdev(values), least) / math.sqrt(n)
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)


def paired_interval(differences: Sequence[float]) -> Interval:
    """Mean difference of two networks over images, each right (1) or wrong (0), with its 95 % interval.

    Half an image is added to each kind of disagreement (Agresti and Min 2005): where two networks agree on all of few
    images, that is no proof that they agree on others.
    """
    n, mean = len(differences), statistics.fmean(differences)
    more = n + 2
    spread = sum(value**2 for value in differences) + 1 - (n * mean) ** 2 / more
    half = quantile(0.975, more - 1) * math.sqrt(spread) / more
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)


def columns(cells: Iterable[Cell]) -> dict[Column, Accuracies]:
    """Accuracies by seed for every (side, attack, student)."""
    table: dict[Column, Accuracies] = defaultdict(dict)
    for cell in cells:
        table[cell.side, cell.attack, cell.student][cell.seed] = cell.accuracy
    return dict(table)


def judge(cells: Sequence[Cell], cost: Interval, data: str, images: int) -> Verdict:
    """The verdict over all cells, whose accuracies were measured on so many `images`.

    A difference is taken seed by seed, then averaged. The worst attack is the one whose *mean* is
    highest, so that picking the luckiest student of each seed does not pass for a leak. Attacks are found by their
    role; where several have one, the first counts. `SpecError` names a role that is lacking.
    """
    table = columns(cells)
    roles = {(cell.side, cell.attack, cell.student): cell.role for cell in cells}
    attacks = {(c.attack, c.student) for c in cells if c.role not in FLOORS and c.side == "victim"}
    if not attacks:
        raise SpecError("The audit has no attack beside the floors; add one, such as SoftLabels(T=4, alpha=0.9).")

    least = least_spread(images)

    def student_of(role: Role, side: Side, student: str) -> Accuracies:
        for column, accuracies in table.items():
            if (roles[column], column[0], column[2]) == (role, side, student):
                return accuracies
        raise SpecError(
            f"The audit has no attack of the role '{role.value}' on side '{side}', beside which others are read. "
            f"{EXAMPLES[role]} is one."
        )

    def hard(student: str) -> Accuracies:
        return student_of(Role.TOP_ANSWERS, "victim", student)

    def labelled(student: str) -> Accuracies:
        floors = (student_of(Role.NO_TEACHER, "none", student), student_of(Role.LABELS, "none", student))
        return max(floors, key=lambda accuracies: statistics.fmean(accuracies.values()))

    def worst(floor: Callable[[str], Accuracies]) -> tuple[Interval, str, str]:
        leaks = [
            (minus(table["victim", attack, who], floor(who), least), attack, who) for attack, who in sorted(attacks)
        ]
        return max(leaks, key=lambda leak: leak[0].mean)

    students = sorted({who for _, who in attacks})
    kd = {who: student_of(Role.PLAIN, "victim", who) for who in students}
    twin = {who: student_of(Role.PLAIN, "honest", who) for who in students}
    scratch = {who: student_of(Role.NO_TEACHER, "none", who) for who in students}
    kd_gain = max((minus(kd[who], scratch[who], least) for who in students), key=lambda leak: leak.mean)
    kd_gain_honest = min((minus(twin[who], scratch[who], least) for who in students), key=lambda leak: leak.mean)
    damage = min((minus(twin[who], kd[who], least) for who in students), key=lambda gap: gap.mean)
    leak_hard, worst_attack, worst_student = worst(hard)
    verdict = Verdict(
        sentence="",
        leak_hard=leak_hard,
        leak_label_smoothing=worst(labelled)[0],
        kd_gain=kd_gain,
        kd_gain_honest=kd_gain_honest,
        damage=damage,
        cost=cost,
        worst_attack=worst_attack,
        worst_student=worst_student,
    )
    words = sentence(verdict, data, _thief_in_words(table, roles), len(attacks))
    return verdict.model_copy(update={"sentence": words})


def best_thief(table: Mapping[Column, Accuracies]) -> Column:
    """The attack on the victim, the copying of top answers among them, that made the best student."""
    asked = [column for column in table if column[0] == "victim"]
    return max(asked, key=lambda column: statistics.fmean(table[column].values()))


def _thief_in_words(table: Mapping[Column, Accuracies], roles: Mapping[Column, Role]) -> str:
    column = best_thief(table)
    kinds = len({attack for side, attack, _ in table if side == "victim"})
    how = "copying only the top answers" if roles[column] == Role.TOP_ANSWERS else column[1]
    accuracy = statistics.fmean(table[column].values())
    return f"the best thief of {kinds} that were tried ({how}) gets a {column[2]} of {accuracy:.1%}"


def minus(a: Accuracies, b: Accuracies, least: float = 0.0) -> Interval:
    """a - b, paired by seed; see `interval`."""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], least)


def least_spread(images: int) -> float:
    """Standard deviation of the difference of two accuracies on so many images that luck alone gives."""
    return 1 / images
