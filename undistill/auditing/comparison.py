"""`comparison.json`: several defences of one network, audited by one suite (docs/comparison.schema.json)."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from undistill.auditing.schema import Interval, Number, Part, Report, Share, Teacher, Text, Twin
from undistill.auditing.verdict import Column, Judge
from undistill.core.errors import SpecError
from undistill.core.identity import fingerprint
from undistill.defences.defence import Defence

NONE = "none"
"""Name of the row without a defence."""
ACCEPTED = 0.005
"""Accuracy that a defence may cost where no price was stated."""
UNSHIPPABLE = ("costly", "miscalibrated", "a_class_pays", "top_answers_flip", "price_not_kept", "answers_vary")
"""Flags that say that users of the model are worse off."""


class Row(Part):
    """One defence. Its whole report lies in `folder`."""

    defence: Text
    folder: Annotated[str, Field(pattern=r"^audits/[\w.-]{1,200}$")]
    """From the comparison's own folder."""
    victim: Teacher
    cost: Interval
    """Accuracy lost against the unprotected network."""
    price: Number | None
    """Points that the owner accepted to lose, if he stated a price."""
    found: dict[Text, Number]
    ece: Number
    """Rise of the expected calibration error."""
    flips: Share
    bits: Number | None
    """The most bits that an answer carries beyond its label; null where nothing bounds them."""
    divergence: Number
    ms_per_query: Number
    ms_per_query_unprotected: Number
    train_seconds: Number
    leak_hard: Interval
    """The attack that is furthest above its floor, minus the better of the students of top answers alone."""
    leak_label_smoothing: Interval
    """The same minus the better of the students without teacher and with smoothed labels."""
    damage: Interval
    """Plain distillation from the unprotected network minus that from this one."""
    worst_attack: Text
    best_attack: Text
    best_accuracy: Share
    """Test accuracy of the thief who was best on validation images."""
    accuracies: dict[Text, Interval]
    """Test accuracy of every attack on this network, by attack and student."""
    beyond: dict[Text, Interval]
    """The same minus the floor of top answers, for the attacks that are none."""
    skipped: list[Text] = Field(default_factory=list)
    """Attacks of the suite that could not be tried on this network."""
    not_shippable: list[Text]
    """Why its users would be worse off; empty where they are not."""


class Comparison(Part):
    """The whole of comparison.json."""

    format: Literal[1] = 1
    title: Text
    by: Text = ""
    made: Annotated[str, Field(max_length=10)] = ""
    data: Text
    classes: Annotated[int, Field(ge=2)]
    suite: Text
    tuning: Text
    recipe: Text
    seeds: Annotated[int, Field(ge=1)]
    test_images: Annotated[int, Field(ge=1)]
    unprotected: Teacher
    rows: Annotated[list[Row], Field(min_length=1, max_length=200)]
    environment: dict[Text, Text | int]


def compared(reports: Sequence[Report], rows: Sequence[Row]) -> Comparison:
    """One comparison of the rows that were made of these reports on the same unprotected network."""
    first, unprotected = reports[0], twin_of(reports[0]).honest
    return Comparison(
        title=f"Defences of {unprotected.spec}",
        by=first.by,
        made=max(report.made for report in reports),
        data=first.data,
        classes=first.classes,
        suite=first.suite,
        tuning=first.tuning,
        recipe=first.recipe,
        seeds=first.verdict.kd_gain.n,
        test_images=first.pairs[0].test_images,
        unprotected=unprotected,
        rows=list(rows),
        environment=first.environment,
    )


def row_of(report: Report, judge: Judge, defence: str) -> Row:
    """The row of one audit."""
    pair, twin, verdict = report.pairs[0], twin_of(report), report.verdict
    attacks = [column for column in judge.table if column[0] in ("victim", "none")]
    best = judge.best_thief
    return Row(
        defence=defence,
        folder=f"audits/{folder_name(defence)}",
        victim=report.victim,
        cost=twin.cost,
        price=pair.price,
        found=pair.found,
        ece=twin.costs.ece,
        flips=pair.flips,
        bits=pair.bits,
        divergence=twin.divergence,
        ms_per_query=twin.costs.ms_per_query_victim or 0.0,
        ms_per_query_unprotected=twin.costs.ms_per_query_honest or 0.0,
        train_seconds=twin.costs.train_seconds,
        leak_hard=verdict.leak_hard,
        leak_label_smoothing=verdict.leak_label_smoothing,
        damage=twin.damage,
        worst_attack=verdict.worst_attack,
        best_attack=verdict.best_attack,
        best_accuracy=judge.accuracy(best).mean,
        accuracies={name_of(column): judge.accuracy(column) for column in attacks},
        beyond={
            name_of(column): judge.minus(column, judge.hard(column[2])) for column in judge.asked if judge.asks(column)
        },
        skipped=list(report.skipped),
        not_shippable=objections(report),
    )


def twin_of(report: Report) -> Twin:
    """A comparison's reports all have one: the unprotected network."""
    if report.twin is None:
        raise SpecError("Defences are compared beside the unprotected network; name its run.")
    return report.twin


def name_of(column: Column) -> str:
    """'SoftLabels(T=4, alpha=0.9) by ConvNet(width=8)'."""
    return f"{column[1]} by {column[2]}"


def objections(report: Report) -> list[str]:
    """Why users of this network would be worse off than its owner said."""
    found = [flag.name for flag in report.flags if flag.name in UNSHIPPABLE]
    stated, cost = report.pairs[0].price, twin_of(report).cost
    accepted = ACCEPTED if stated is None else stated / 100
    surely = cost.mean if cost.low is None else cost.low
    if surely > accepted:  # which says more than the flag does
        how = f"costs at least {100 * surely:.1f} points of accuracy, more than {100 * accepted:g}"
        return [how, *(name for name in found if name != "costly")]
    return found


def parse_defences(text: str) -> list[str]:
    """The defences of 'Nasty(price=0.5) + Sealed(levels=4)', in their order; none for 'none'.

    A plus inside parentheses or quotes separates nothing. Raises `SpecError` for an empty part.
    """
    if text.strip().casefold() == NONE:
        return []
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character == "(") - (character == ")") if not quote else 0
        if character == "+" and not depth and not quote and parts[-1][-1:] in ("", " ", ")"):
            parts.append("")
        else:
            parts[-1] += character
    if not all(part.strip() for part in parts):
        raise SpecError(f"Cannot read '{text}': write one defence, or several as A(...) + B(...), or none.")
    return [part.strip() for part in parts]


def row_name(defences: Sequence[Defence]) -> str:
    """'Nasty(price=0.5) + Sealed(levels=2)': fields at their defaults are left out; `parse_defences` reads it."""
    return " + ".join(one.brief for one in defences) or NONE


def folder_name(text: str) -> str:
    """'nasty-sealed-1a2b3c' of 'Nasty(price=0.5) + Sealed(levels=4)'."""
    names = [part.split("(")[0].rpartition(":")[2].lower() for part in parse_defences(text)]
    return "-".join([*(names or [NONE]), fingerprint(text)[:6]])
