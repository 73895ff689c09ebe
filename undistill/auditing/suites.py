"""Frozen suites of attacks. A published suite never changes; a better one gets a new number.

`tests/test_tuning.py` fails when the content of one changes.
"""

from dataclasses import dataclass

from pydantic import Field

from undistill.core.errors import SpecError, unknown
from undistill.core.spec import Spec


class Tuning(Spec):
    """How hard every thief tunes."""

    offered = False

    trials: int = Field(1, ge=1, le=1000)
    """Settings that are tried for each attack, the listed one first."""
    share: float = Field(1 / 3, gt=0, le=1)
    """Share of the epochs for which a trial trains."""


FLOORS = ("Scratch()", "LabelSmoothing(smoothing=0.1)", "HardLabels()")
PLAIN = ("SoftLabels(T=4, alpha=0.9)", "SoftLabels(T=1, alpha=0.9)", "SoftLabels(T=20, alpha=0.9)")
"""The first is the paper's, by which damage is measured."""
ADAPTIVE = (
    "LSKD(T=2, weight=9, floor=1e-12)",
    "AffineMap(T=4, alpha=0.9, speed=1, matrix=False)",
    "Chain(n=3, T=4, alpha=0.9)",
)
THIEF = "ConvNet(width=8)"
UNTUNED = Tuning(trials=1)


@dataclass(frozen=True)
class Suite:
    """Attacks and students as spec texts, so that a name always means the same audit."""

    about: str
    attacks: tuple[str, ...]
    students: tuple[str, ...] = (THIEF,)
    tuning: Tuning = UNTUNED


SUITES = {
    "floors-1": Suite(
        "The floors and plain distillation at T 4 alone, for attacks that you name yourself.",
        attacks=(*FLOORS, PLAIN[0]),
    ),
    "quick-2": Suite(
        "A first look: plain distillation at three temperatures, and the floors beside which it is read. No "
        "thief adapts or tunes.",
        attacks=(*FLOORS, *PLAIN),
    ),
    "standard-1": Suite(
        "Eight attacks, adaptive ones among them, each tuned in three trials.",
        attacks=(*FLOORS, PLAIN[0], "HTC(T=50, alpha=0.9, sides='victim')", *ADAPTIVE),
        tuning=Tuning(trials=3),
    ),
    "thorough-1": Suite(
        "Every attack that needs answers and the owner's kind of images, two students, each tuned in ten "
        "trials at half the epochs. MKD is left to whoever names it, since a patent application covers it.",
        attacks=(
            *FLOORS,
            "FixMatch(threshold=0.95, mu=7, weight=1)",
            *PLAIN,
            "SoftOnly(T=1)",
            "LogitMatching(alpha=0.9, floor=1e-05)",
            "DKD(T=4, alpha=1, beta=8, warmup=0.08333333333333333)",
            "DIST(T=4, beta=2, gamma=2)",
            "HTC(T=50, alpha=0.9, sides='victim')",
            *ADAPTIVE,
            "Averager(T=4, alpha=0.9)",
            "Skeptical(T=4, alpha=0.9, own=0.3, wait=0.05)",
            "Reweighting(T=4, alpha=0.9, beta=1, held=0.05)",
            "QuerySmoothing(k=3, T=4, alpha=0.9)",
            "PBayes(T=4, alpha=0.9, c=8, draws=20, rounds=2, oracle=False)",
        ),
        students=(THIEF, "ResNetC(depth=20, width=16)"),
        tuning=Tuning(trials=10, share=0.5),
    ),
    "white-box-1": Suite(
        "A thief who has the weights: copies tuned on few labels, and data-free distillation, which strip "
        "every defence that changes answers only. Beside them plain distillation.",
        attacks=(
            *FLOORS,
            PLAIN[0],
            "FineTune(epochs=5, share=0.01)",
            "FineTune(epochs=5, share=0.1)",
            "DAFL(lr=0.02, latent=100, width=64, one_hot=1, activation=0.1, entropy=5, T=4)",
            "ZSKT(lr=0.001, latent=100, width=64, student_steps=10)",
            "DeepInversion(count=2000, steps=200, lr=0.05, statistics=1, variation=1, l2=0.001, rounds=2, "
            "competition=1, T=4)",
            "Fast(lr=0.002, latent=100, width=64, inner=5, every=20, warmup=20, outer=0.1, one_hot=0.5, "
            "statistics=1, adversarial=1, T=4, bank=20000)",
        ),
    ),
    "budget-1": Suite(
        "Thieves who buy each answer once, for --budget or --curve: labels, labels beside images that nobody "
        "labelled, and plain distillation, each tuned in three trials.",
        attacks=(
            "Scratch()",
            "LabelSmoothing(smoothing=0.1)",
            "HardLabels(once=True)",
            "FixMatch(threshold=0.95, mu=7, weight=1)",
            "SoftLabels(once=True, T=4, alpha=0.9)",
            "LSKD(once=True, T=2, weight=9, floor=1e-12)",
        ),
        tuning=Tuning(trials=3),
    ),
}


def find_suite(name: str) -> Suite:
    if name not in SUITES:
        raise SpecError(unknown("suite", name, SUITES))
    return SUITES[name]
