"""`report.json`: the audit's product. Accuracies are shares from 0 to 1; docs/report.schema.json is made from here."""

from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from undistill.attacks.attack import Buying, Role, ThiefData

Side = Literal["victim", "honest", "none"]
Share = Annotated[float, Field(ge=0, le=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]
Number = Annotated[float, Field(ge=-1e18, le=1e18)]
"""Nothing that is measured is beyond, and a hundred times as much can still be written."""
NotNegative = Annotated[float, Field(ge=0, le=1e18)]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=10_000)]


Predictions = Annotated[str, Field(max_length=2**28)]


class Part(BaseModel):
    """NaN and infinity are no numbers here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Interval(Part):
    """A mean with its 95 % interval; the ends are null where a single measurement has no spread."""

    mean: Number
    low: Number | None
    high: Number | None
    n: Annotated[int, Field(ge=1)]


def plus_minus(value: Interval, times: float = 1, sign: str = "") -> str:
    """'91.2 ± 0.4', half a 95 % interval behind the mean, or '91.2' where a single measurement has no spread."""
    half = "" if value.high is None else f" ± {times * (value.high - value.mean):.1f}"
    return f"{times * value.mean:{sign}.1f}{half}"


class Teacher(Part):
    """One network on the test set; `nll` in nats, of probabilities of at least 1.2e-7. Means of several.

    What reports of earlier versions do not have is null or empty.
    """

    spec: Text
    accuracy: Share
    nll: NotNegative
    ece: Share
    brier: NotNegative | None = None
    """Squared distance of probabilities from the label, 0 to 2."""
    top5: Share | None = None
    """Share of labels among the five highest answers."""
    selective: Share | None = None
    """Accuracy on the 80 % of images of which it is surest."""
    by_class: list[Share | None] = Field(default_factory=list)
    """Accuracy on each class; null where there is no test image of it."""


class ClassLoss(Part):
    """The class that surely lost the most accuracy, with an interval wide enough for the choice among all classes."""

    name: Text
    lost: Interval


class Reached(Part):
    """How a black box was asked, and what that took in all audits that share its ledger."""

    spec: Text
    """The black box as it was named."""
    output: Literal["probabilities", "logits", "labels"]
    form: Literal["label", "top", "full"]
    """How much of an answer it shows."""
    bought: Count
    """Answers that are kept: one for each different image, or for each asking where answers vary."""
    billed: Count
    """Images that it answered: those, and a few by which it was recognised."""
    lost: Count
    """Images that were asked and whose answers did not arrive; it may have billed them."""


class Pair(Part):
    """One victim with its honest twin. What compares the two is null where no twin is known."""

    victim: Teacher
    honest: Teacher | None
    divergence: Number | None
    agreement: Share | None
    """Share of test images to which both give the same top answer."""
    honest_train_accuracy: Share | None
    test_images: Annotated[int, Field(ge=1)]
    adopted_weights: bool
    """The honest teacher started from weights made elsewhere; without a twin, the victim did."""
    unseen: bool = False
    """Whoever adopted them named the test images as such on which they were not trained."""
    membership_gap: Number = 0.0
    """Mean confidence of the honest teacher on training images minus that on test images; a memory of both has none."""
    same_origin: bool
    """The victim was protected from this honest teacher."""
    responses: list[Text] = Field(default_factory=list)
    """Defences of the victim that change answers only."""
    calibrated_on: dict[Text, Text] = Field(default_factory=dict)
    """The images by which each of them was calibrated; never the test images."""
    bits: NotNegative | None = None
    """The most bits that an answer carries beyond its label; null where nothing bounds them."""
    form: Literal["label", "top", "full"] | None = None
    """How much of an answer the victim shows; null in reports of earlier versions."""
    flips: Share = 0.0
    """Share of test images of which a response changes the top answer."""
    price: Number | None = None
    """Points of accuracy that the owner accepted to lose; null where no price was stated."""
    validation_cost: Interval | None = None
    """Accuracy lost on validation images, by which a price is kept; null in reports of earlier versions."""
    found: dict[Text, Number] = Field(default_factory=dict)
    """Numbers that the defence found by itself, such as omega."""
    worst_class: ClassLoss | None = None
    reached: Reached | None = None
    """Null for a network whose run is at hand."""
    answers_vary: bool = False
    """The victim answers one image differently each time."""
    self_agreement: Share = 1.0
    """Share of test images that get the same top answer from the victim however often it is asked."""
    zeros: Share = 0.0
    """Share of the victim's probabilities on test images that are 0 though they were shown."""
    victim_sha256: Text = ""
    """Hash of the victim's weights."""
    identity: Text = ""
    """Hash of everything on which an answer of the victim depends; empty in reports of earlier versions."""
    honest_sha256: Text = ""
    """Hash of the honest teacher's weights."""
    data_sha256: Text = ""
    """Hash of every image and label, in order."""

    @property
    def may_be_memory(self) -> bool:
        """Whether the test images may have been among those on which the model was trained."""
        return self.adopted_weights and not self.unseen


class Threat(Part):
    """A thief's access, data and way of asking."""

    access: Literal["nothing", "answers", "weights"]
    data: ThiefData
    form: Literal["label", "top", "full"]
    """The least that answers must show."""
    buying: Buying
    images: Count
    """Images of his own."""


class Cell(Part):
    """One student. Side 'none' is an attack that asks nobody; its fidelity is to the victim."""

    side: Side
    attack: Text
    """As it was run, with the settings that its thief chose."""
    listed: Text = ""
    """As the suite lists it, before its thief tuned it; empty where that is the same."""
    student: Text
    seed: int
    accuracy: Share
    fidelity: Share
    validation: Share = 0.0
    """Accuracy on the thief's validation images."""
    predictions: Predictions = ""
    """Top answer to each test image, see predictions.py; empty in report.json, which gives figures alone."""
    role: Role
    """Role in the comparison, such as a floor or the plain attack."""
    queries: Count
    """Images that the victim answered, again each time they were asked: what an endpoint would bill."""
    distinct: Count
    """Different images among them."""
    budget: Count | None = None
    """The most queries that it was allowed."""
    threat: Threat | None = None
    """Null in reports of earlier versions."""
    evaluation: Count = 0
    """Answers of the victim that the auditor needed for measuring this student."""
    seconds: NotNegative
    late_gain: Difference
    """Validation accuracy gained in the last fifth of the epochs: near 0 where training was long enough."""
    compute: Text
    """How the student was computed."""
    diverged: Text = ""
    """Why training ended without a student, which then counts as one that always gives the first class."""
    environment: Text = ""
    """Code and machine of the measurement, in words."""

    @property
    def column(self) -> tuple[Side, str, str]:
        """Side, attack as it is listed, student: cells of all seeds are averaged under it."""
        return self.side, self.listed or self.attack, self.student


class Trial(Part):
    """One setting of an attack that its thief tried, judged by validation images alone."""

    side: Side
    attack: Text
    listed: Text = ""
    """The attack as the suite lists it; empty where that is the same."""
    student: Text
    seed: int
    recipe: Text
    score: Share
    """The thief's own measure: accuracy on his validation images, or without labels how often the student gives the
    victim's top answer to them."""
    validation: Share
    """Accuracy on the validation images, by which an auditor picks the worst thief."""
    queries: Count
    images: Count = 0
    """Validation images that judged it; 0 in reports of earlier versions."""
    granted: Count = 0
    """Answers to validation images by which a thief without labels was judged. They are not in his queries."""
    seconds: NotNegative
    diverged: Text = ""

    @property
    def column(self) -> tuple[Side, str, str]:
        """As of a cell."""
        return self.side, self.listed or self.attack, self.student


class Verdict(Part):
    """Differences of test accuracy. Positive leaks are good for the thief."""

    sentence: Text
    leak: Interval | None = None
    """Gain from answers beyond their labels: `leak_hard`, and for a thief with labels of his own no more than
    `leak_label_smoothing`. Null where it was not assessed, and in reports of earlier versions."""
    leak_hard: Interval
    """Worst attack minus the better of the students of top answers alone."""
    leak_label_smoothing: Interval
    """Worst attack minus the better of the students without teacher and with smoothed labels."""
    kd_gain: Interval
    """Plain distillation from the victim, as its thief tuned it, minus no teacher; the paper does not tune."""
    kd_gain_honest: Interval | None
    """The same from the honest twin: the positive control."""
    damage: Interval | None
    """Plain distillation from the honest twin minus that from the victim, each as its thief tuned it. Null, as
    everything that needs the twin, where none is known."""
    damage_best: Interval | None = None
    """The same for the best thief; null where the unprotected twin was not attacked so."""
    cost: Interval | None
    """Honest accuracy minus victim accuracy."""
    bits: NotNegative | None = None
    """The most bits that an answer carries beyond its label, by construction; null where nothing bounds them."""
    worst_attack: Text
    """The attack that was furthest above its floor on validation images."""
    worst_student: Text
    best_attack: Text = ""
    """The attack whose student was best on validation images, floors included."""
    best_student: Text = ""


class Costs(Part):
    """Victim minus honest twin on the test set, and what protecting took."""

    accuracy_lost: Number
    nll: Number
    ece: Number
    brier: Number | None = None
    top5: Number | None = None
    """Share of labels among the five highest answers that is lost; positive is a loss."""
    selective: Number | None = None
    """Accuracy lost at 80 % coverage."""
    l1: Number
    ms_per_query_victim: Number | None
    """Null for a black box."""
    ms_per_query_honest: Number | None
    train_seconds: Number


class Twin(NamedTuple):
    """All that a report says of an honest twin, see the fields of the same names."""

    honest: Teacher
    divergence: float
    agreement: float
    """Mean over pairs."""
    costs: Costs
    cost: Interval
    damage: Interval
    kd_gain_honest: Interval


class Flag(Part):
    """One reason to doubt this result."""

    name: Text
    message: Text


class Report(Part):
    """The whole of report.json."""

    format: Literal[3] = 3
    title: Text
    by: Text = ""
    """Whoever audited."""
    made: Annotated[str, Field(max_length=10)] = ""
    """Date (UTC) on which the last student was finished."""
    data: Text
    classes: Annotated[int, Field(ge=2)]
    class_names: Annotated[list[Text], Field(max_length=100_000)] = Field(default_factory=list)
    suite: Text
    recipe: Text
    victim: Teacher
    honest: Teacher | None
    """Null where no twin is known."""
    pairs: Annotated[list[Pair], Field(min_length=1)]
    cells: Annotated[list[Cell], Field(min_length=1)]
    trials: list[Trial] = Field(default_factory=list)
    """Settings that thieves tried before, judged by validation images."""
    tuning: Text = ""
    searched_by: Text = ""
    """Name of the search that proposed these settings."""
    skipped: dict[Text, Text] = Field(default_factory=dict)
    """Attacks of the suite that cannot be tried on these networks, and why."""
    curve: list[Cell] = Field(default_factory=list)
    """Students of thieves with smaller and larger budgets, each of whom buys one answer for each image."""
    divergence: Number | None
    """T^2 KL(victim/T || honest/T) at T = 4 on the validation split, in nats; mean over pairs."""
    costs: Costs | None
    """Null where no twin is known."""
    verdict: Verdict
    flags: list[Flag]
    environment: dict[Text, Text | int]

    @model_validator(mode="before")
    @classmethod
    def _earlier_format(cls, report: Any) -> Any:
        """Format 1 had other names for some fields; 2 had no trials."""
        if not isinstance(report, dict) or report.get("format") not in (1, 2):
            return report
        if report["format"] == 2:
            return report | {"format": 3}
        cells = [_cell_of_format_1(cell) for cell in report.get("cells") or []]
        verdict = _renamed(report.get("verdict"), {"poison": "kd_gain", "control": "kd_gain_honest"})
        return report | {"format": 3, "cells": cells, "verdict": verdict}

    @property
    def twin(self) -> Twin | None:
        """All that needs an honest twin; None where none is known."""
        verdict, agreed = self.verdict, [pair.agreement for pair in self.pairs if pair.agreement is not None]
        parts = {
            "honest": self.honest,
            "divergence": self.divergence,
            "agreement": fmean(agreed) if agreed else None,
            "costs": self.costs,
            "cost": verdict.cost,
            "damage": verdict.damage,
            "kd_gain_honest": verdict.kd_gain_honest,
        }
        known = {name: part for name, part in parts.items() if part is not None}
        if known and len(known) < len(parts):
            lacking = [name for name in parts if name not in known]
            raise ValueError(f"of an honest twin it says {', '.join(known)}, and not {', '.join(lacking)}")
        return Twin(**known) if known else None  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _whole_twin(self) -> Self:
        """A page that shows some of it would say that the rest was measured, too."""
        _ = self.twin
        return self

    @field_validator("cells")
    @classmethod
    def _few_rows(cls, cells: list[Cell]) -> list[Cell]:
        """A page with more rows, and a figure of more panels, would take hours to draw."""
        rows = {(cell.side, cell.attack, cell.student) for cell in cells}
        if len(rows) > 2000 or len({cell.student for cell in cells}) > 100:
            raise ValueError("more than 2,000 attacks, or more than 100 students")
        return cells


def _cell_of_format_1(cell: Any) -> Any:
    """Upgrade a cell that has no role: it is derived from the attack's name."""
    if not isinstance(cell, dict):
        return cell
    roles = {"Scratch": "no teacher", "LabelSmoothing": "labels", "HardLabels": "top answers", "SoftLabels": "plain"}
    roles |= dict.fromkeys(("DAFL", "Fast", "ZSKT", "DeepInversion"), "data-free")
    named = str(cell.get("attack", "")).partition("(")[0]
    role = roles.get(named, "labels" if cell.get("floor") else "other")
    known = {name: value for name, value in _renamed(cell, {"engine": "compute"}).items() if name != "floor"}
    return {"role": role, "distinct": cell.get("queries"), **known}


def _renamed(record: Any, names: dict[str, str]) -> Any:
    return {names.get(name, name): value for name, value in record.items()} if isinstance(record, dict) else record
