"""The decision and the controls follow from the figures of a report, by rules that docs/review.md states."""

import json
from pathlib import Path
from typing import Any

import pytest

from undistill.attacks.attack import Role
from undistill.auditing.curve import harmless, queries_within
from undistill.auditing.schema import Flag, Interval, Reached, Report, Trial
from undistill.auditing.wording import TITLE, UNPROTECTED
from undistill.report.decision import decide
from undistill.report.page import read_report, render
from undistill.report.review import CATALOGUE, controls, fields, told

DOCUMENT = (Path(__file__).parents[1] / "docs" / "review.md").read_text()


def of(mean: float, half: float = 0.01, n: int = 5) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)


def changed(report: Report, *, copy: float = 0.8, adaptive: bool = True, **verdict: Any) -> Report:
    """A report of five seeds in which nothing leaks, every copy has one accuracy, and the model 0.95.

    If it is `adaptive`, a thief tuned an attack that was made against defences.
    """
    found = {"kd_gain": of(0.0), "leak": of(0.0), "cost": of(0.0), "damage": of(0.1)} | verdict
    plain = next(cell for cell in report.cells if cell.role == Role.PLAIN and cell.side == "victim")
    bold = plain.model_copy(update={"role": Role.ADAPTIVE, "attack": "HTC(T=50, alpha=0.9)"})
    trial = Trial(
        side="victim",
        attack=bold.attack,
        student=bold.student,
        seed=9,
        recipe="",
        score=0.5,
        validation=0.5,
        queries=1,
        seconds=0.0,
    )
    cells = [*report.cells, *([bold] if adaptive else [])]
    return report.model_copy(
        update={
            "verdict": report.verdict.model_copy(update=found),
            "victim": report.victim.model_copy(update={"accuracy": 0.95}),
            "cells": [cell.model_copy(update={"accuracy": copy}) for cell in cells],
            "trials": [trial] * 3 if adaptive else [],
            "flags": [],
        }
    )


def with_curve(report: Report, accuracies: dict[int, float]) -> Report:
    thief = next(cell for cell in report.cells if cell.side == "victim" and cell.role == Role.PLAIN)
    curve = [
        thief.model_copy(update={"budget": queries, "queries": queries, "accuracy": accuracy})
        for queries, accuracy in accuracies.items()
    ]
    return report.model_copy(update={"curve": curve})


def with_pair(report: Report, **values: Any) -> Report:
    return report.model_copy(update={"pairs": [pair.model_copy(update=values) for pair in report.pairs]})


def test_a_model_whose_copies_are_bad_may_ship(report: Report) -> None:
    assert decide(changed(report, copy=0.8)).choice == "ship"
    assert decide(changed(report, copy=0.849)).choice == "ship"
    plain = decide(changed(report, adaptive=False))
    assert plain.choice == "ship with limits"
    assert "Only plain thieves" in plain.limits[0]


def test_a_model_whose_labels_make_a_good_copy_ships_with_a_budget(report: Report) -> None:
    near = changed(report, copy=0.9)
    found = decide(near)
    assert found.choice == "ship with limits"
    assert "--curve" in found.limits[0]
    curve = {100: 0.5, 300: 0.8, 1000: 0.86, 3000: 0.91}
    assert "At most 300 queries" in decide(with_curve(near, curve)).limits[0]
    assert "Fewer than 100 queries" in decide(with_curve(near, {100: 0.9, 300: 0.91})).limits[0]


def test_the_curve_says_how_many_queries_are_harmless(report: Report) -> None:
    found = with_curve(changed(report), {100: 0.5, 300: 0.84, 1000: 0.86, 3000: 0.91, 5000: 0.94})
    assert queries_within(found) == {"0.1": 1000, "0.05": 3000, "0.02": 5000}
    assert harmless(found) == 300
    assert harmless(with_curve(changed(report), {100: 0.5})) == 100
    assert harmless(changed(report).model_copy(update={"curve": []})) is None


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        ({"leak": of(0.03)}, "3.0 points beyond labels"),
        ({"leak": of(0.0, 0.07)}, "up to 7.0 points"),
        ({"leak": None}, "not assessed"),
        ({"kd_gain": of(0.0, n=2)}, "trained twice"),
    ],
)
def test_what_leaks_or_is_not_known_does_not_ship(report: Report, verdict: dict[str, Any], why: str) -> None:
    found = decide(changed(report, copy=0.5, **verdict))
    assert found.choice == "do not ship"
    assert why in found.why[0]
    assert found.limits


def test_a_price_that_was_not_kept_does_not_ship(report: Report) -> None:
    dear = with_pair(changed(report, cost=of(0.03)), price=1.0)
    assert decide(dear).choice == "do not ship"
    assert decide(with_pair(dear, price=2.5)).choice == "ship"


def test_memory_and_flags_that_spoil_figures_do_not_ship(report: Report) -> None:
    good = changed(report)
    assert decide(with_pair(good, adopted_weights=True, unseen=False)).choice == "do not ship"
    for name in ("selected_on_test", "no_gain_from_honest", "diverged", "student_at_chance"):
        assert decide(good.model_copy(update={"flags": [Flag(name=name, message="...")]})).choice == "do not ship"
        assert name in DOCUMENT
    assert decide(good.model_copy(update={"flags": [Flag(name="one_teacher", message="...")]})).choice == "ship"


def test_a_response_alone_keeps_the_file_at_home(report: Report) -> None:
    found = decide(with_pair(changed(report), responses=["Sealed(levels=4)"]))
    assert any("never the file" in limit for limit in found.limits)


def test_every_control_has_a_status_and_leads_to_its_figures(report: Report, folder: Path) -> None:
    html = (folder / "report.html").read_text()
    found = controls(report)
    assert len({one.id for one in found}) == len(found) == len(CATALOGUE)
    for one in found:
        assert one.status in ("met", "partly", "not assessed")
        assert one.where or one.status == "not assessed"
        assert not one.where or f'id="{one.where}"' in html
        assert one.id in html
        assert one.id in DOCUMENT


def status(report: Report, name: str) -> str:
    return next(one.status for one in controls(report) if one.id == name)


def test_outputs_are_a_met_control_only_by_thieves_who_adapt(report: Report) -> None:
    assert status(changed(report, adaptive=False), "v1.0-C11.3.2") == "partly"
    tuned = changed(report)
    assert status(tuned, "v1.0-C11.3.2") == status(tuned, "AML.M0002") == status(tuned, "AML.T0024.002") == "met"
    leaks = tuned.model_copy(update={"verdict": tuned.verdict.model_copy(update={"leak": of(0.03)})})
    assert status(leaks, "v1.0-C11.3.2") == "partly"
    bare = tuned.model_copy(update={"title": f"{TITLE}{UNPROTECTED}"})
    assert status(bare, "v1.0-C11.3.2") == "partly"
    assert status(bare, "AML.M0002") == "not assessed"


def test_what_an_audit_cannot_see_is_not_assessed(report: Report) -> None:
    for name in ("v1.0-C11.3.3", "v1.0-C11.3.4", "AML.M0019", "AML.M0024"):
        assert status(with_curve(changed(report), {100: 0.9}), name) == "not assessed"
    assert status(with_curve(changed(report), {100: 0.9}), "AML.M0004") == "partly"
    assert status(changed(report), "AML.M0004") == "not assessed"


def test_a_black_box_is_not_said_to_be_unprotected(report: Report) -> None:
    reached = Reached(spec="Http('x')", output="probabilities", form="full", bought=1, billed=1, lost=0)
    box = with_pair(changed(report), reached=reached)
    (outputs,) = (one for one in controls(box) if one.id == "v1.0-C11.3.2")
    assert outputs.status == "partly"
    assert "not known" in outputs.why
    assert fields(box)["defence"]["name"] is None


def test_a_curve_without_a_harmless_budget_says_so(report: Report) -> None:
    (quantity,) = (one for one in controls(with_curve(changed(report), {100: 0.9})) if one.id == "AML.M0004")
    assert "no budget was found" in quantity.why


def test_who_has_the_weights_does_not_decide_about_answers(report: Report) -> None:
    found = changed(report, copy=0.8)
    plain = next(cell for cell in found.cells if cell.role == Role.PLAIN and cell.side == "victim")
    threat = plain.threat.model_copy(update={"access": "weights"})
    strong = {"role": Role.WHITE_BOX, "attack": "FineTune()", "accuracy": 0.95, "validation": 1.0, "threat": threat}
    cells = [*found.cells, plain.model_copy(update=strong)]
    assert decide(found.model_copy(update={"cells": cells})).choice == "ship"


def test_the_file_for_programs_says_what_the_page_says(folder: Path) -> None:
    render(folder)
    report = read_report(folder)
    found = json.loads((folder / "controls.json").read_text())
    assert found["decision"] == json.loads(json.dumps(decide(report)._asdict()))
    assert found["fields"] == json.loads(json.dumps(fields(report)))
    assert [one["id"] for one in found["controls"]] == [one.id for one in controls(report)]
    before = (folder / "controls.json").read_bytes()
    render(folder)
    assert before == (folder / "controls.json").read_bytes()


def test_fields_are_counts_of_the_ledger(report: Report) -> None:
    found = fields(report)
    assert found["queries by ledger"]["most of one thief"] == max(cell.queries for cell in report.cells)
    assert found["queries by ledger"]["of all students"] == sum(cell.queries for cell in report.cells)
    assert found["defence"]["form of answers"] == "full"
    assert found["model"]["SHA-256"] == [report.pairs[0].victim_sha256]


def test_fields_are_told_in_words() -> None:
    told_ones = {None: "not assessed", True: "yes", 1200: "1,200", 0.5: "0.5", "x": "x"}
    assert {value: told(value) for value in told_ones} == told_ones
    assert told({"mean": 0.5, "low": None, "high": None, "n": 1}) == "0.5000, n = 1"
    assert told({"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}) == "0.5000 (0.4000 to 0.6000), n = 3"
    assert told([]) == told({}) == "none"
