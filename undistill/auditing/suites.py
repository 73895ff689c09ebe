"""Frozen lists of attacks. A published suite never changes; a better one gets a new name."""

from dataclasses import dataclass

from undistill.core.errors import SpecError, unknown

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Suite:
    """Attacks and students as spec texts, so that a name always means the same audit."""

    about: str
    attacks: tuple[str, ...]
    students: tuple[str, ...]


SUITES = {
    "quick": Suite(
        "plain distillation and the floors beside which it is read",
        attacks=("Scratch()", "LabelSmoothing(smoothing=0.1)", "SoftLabels(T=4, alpha=0.9)", "HardLabels()"),
        students=("ConvNet(width=8)",),
    ),
}


def find_suite(name: str) -> Suite:
    if name not in SUITES:
        raise SpecError(unknown("suite", name, SUITES))
    return SUITES[name]
