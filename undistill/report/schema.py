"""`report.json`: the audit's product. Accuracies are shares from 0 to 1; docs/report.schema.json is made from here."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Side = Literal["victim", "honest", "none"]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Part):
    """A mean with its 95 % interval; the ends are null where a single measurement has no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int


class Teacher(Part):
    """One network on the test set; `nll` in nats. Means over pairs where there are several."""

    spec: str
    accuracy: float
    nll: float
    ece: float


class Pair(Part):
    """One victim with its honest twin."""

    victim: Teacher
    honest: Teacher
    divergence: float
    agreement: float
    """Share of test images to which both give the same top answer."""
    honest_train_accuracy: float
    test_images: int
    adopted_weights: bool
    """The honest teacher started from weights made elsewhere."""
    same_origin: bool
    """The victim was protected from this honest teacher."""


class Cell(Part):
    """One student. Side 'none' is an attack that asks nobody; its fidelity is to the victim."""

    side: Side
    attack: str
    student: str
    seed: int
    accuracy: float
    fidelity: float
    queries: int
    seconds: float
    floor: bool
    late_gain: float
    """Validation accuracy gained in the last fifth of the epochs: near 0 where training was long enough."""
    engine: str
    """How the student was computed."""
    diverged: str = ""
    """Why training ended without a student, which then counts as one that always gives the first class."""
    environment: str = ""
    """By which code it was measured, and on what."""


class Verdict(Part):
    """Differences of test accuracy. Positive leaks are good for the thief."""

    sentence: str
    leak_hard: Interval
    """Worst attack minus the hard-label student: what the answers give away beyond the label."""
    leak_label_smoothing: Interval
    """Worst attack minus the better of the scratch and label-smoothed students."""
    poison: Interval
    """Plain KD from the victim minus scratch: the paper's own figure."""
    control: Interval
    """Plain KD from the honest twin minus scratch: the positive control."""
    damage: Interval
    """Plain KD from the honest twin minus plain KD from the victim."""
    cost: Interval
    """Honest accuracy minus victim accuracy."""
    worst_attack: str
    worst_student: str


class Costs(Part):
    """Victim minus honest twin on the test set, and what protecting took."""

    accuracy_lost: float
    nll: float
    ece: float
    l1: float
    ms_per_query_victim: float
    ms_per_query_honest: float
    train_seconds: float


class Flag(Part):
    """A way in which this result could mislead."""

    name: str
    message: str


class Report(Part):
    format: Literal[1] = 1
    title: str
    data: str
    classes: int
    suite: str
    recipe: str
    victim: Teacher
    honest: Teacher
    pairs: list[Pair]
    cells: list[Cell]
    divergence: float
    """T^2 KL(victim/T || honest/T) at T = 4 on the validation split, in nats; mean over pairs."""
    costs: Costs
    verdict: Verdict
    flags: list[Flag]
    environment: dict[str, str | int]
