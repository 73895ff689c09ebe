"""The curve: a fresh student for every budget, and what a copy costs in queries."""

from pathlib import Path

import pytest

from tests.conftest import RECIPE, STUDENT
from tests.test_cli import call
from undistill.api.audits import audit, plan_audit
from undistill.attacks import Attack
from undistill.auditing.curve import bought_once, budgets, curve_jobs, lines, named_or_plain, price_of_a_copy, stretched
from undistill.auditing.plan import CURVE_FLOORS
from undistill.auditing.schema import Cell, Report
from undistill.auditing.tuning import configured
from undistill.core.errors import StoreError
from undistill.report.drawing import draw_named
from undistill.report.page import read_report
from undistill.runs.run import Run


def test_budgets_end_with_all_images() -> None:
    assert budgets(2500) == [100, 300, 1000, 2500]
    assert budgets(100) == [100]
    assert budgets(77) == [77]


def test_few_images_are_seen_more_often() -> None:
    assert stretched(RECIPE, 10).epochs == 10 * RECIPE.epochs
    assert bought_once(Attack.parse("SoftLabels()")) == Attack.parse("SoftLabels(once=True)")
    assert bought_once(Attack.parse("FixMatch()")) == Attack.parse("FixMatch()")


@pytest.fixture(scope="module")
def report(victim: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("curve") / "audit"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("undistill.auditing.curve.budgets", lambda images: [20, images])
    try:
        return audit(victim, out, students=[STUDENT], seeds=2, curve=True, recipe=RECIPE, device="cpu"), out
    finally:
        monkeypatch.undo()


def test_a_curve_has_every_thief_at_every_budget(report: tuple[Report, Path]) -> None:
    found, _ = report
    names = [(line.side, line.attack.split("(")[0]) for line in lines(found.curve)]
    thief = names[0][1]
    assert names == [("victim", thief), ("honest", thief), ("victim", "HardLabels"), ("victim", "FixMatch")]
    for line in lines(found.curve):
        assert [len(cells) for cells in line.cells.values()] == [2, 2]
        assert min(line.cells) == 20
        for queries, cells in line.cells.items():
            assert {cell.queries for cell in cells} == {queries}, "each answer was bought once"
    assert not any(cell.predictions for cell in found.curve)


def test_a_curve_is_drawn_and_priced(report: tuple[Report, Path]) -> None:
    found, out = report
    above, below = draw_named("curve", [out]).axes
    bought = sorted({cell.budget for cell in found.curve})
    assert [tick.get_text() for tick in below.get_xticklabels()] == [f"{budget:,}" for budget in bought]
    assert len({line.get_color() for line in above.get_lines()}) == 3, "protected, unprotected, floors"
    html = (out / "report.html").read_text()
    assert "What a copy costs in queries" in html
    assert price_of_a_copy(found) in html
    assert call("figure", "curve", out).exit_code == 0
    plain = read_report(out).model_copy(update={"curve": []})
    from undistill.report.curves import queries

    with pytest.raises(StoreError, match=r"has no curve.*--curve"):
        queries(plain)


def test_the_price_of_a_copy_by_hand(report: tuple[Report, Path]) -> None:
    found, _ = report

    def cell(budget: int, accuracy: float, validation: float, attack: str = "A()") -> Cell:
        new = {"budget": budget, "accuracy": accuracy, "validation": validation, "attack": attack, "side": "victim"}
        new["listed"] = ""
        return found.curve[0].model_copy(update=new)

    teacher = found.victim.model_copy(update={"accuracy": 0.9})
    curve = [cell(100, 0.7, 0.7), cell(100, 0.9, 0.6, "Lucky()"), cell(1000, 0.86, 0.8), cell(3000, 0.87, 0.9)]
    made = found.model_copy(update={"victim": teacher, "curve": curve})
    assert price_of_a_copy(made) == (
        "1,000 queries buy a copy within 5 points of the protected model; not even 3,000 queries buy a copy within 2 "
        "points of the protected model."
    )
    worse = made.model_copy(update={"curve": curve[:2]})
    assert price_of_a_copy(worse) == "Not even 100 queries buy a copy within 10 points of the protected model."


def test_a_thief_with_weights_has_no_curve_and_the_plain_one_takes_its_place(victim: Run) -> None:
    plan = plan_audit(victim, students=[STUDENT], attacks=["ZSKT()"], device="cpu")
    name = "ZSKT(lr=0.001, latent=100, width=64, student_steps=10)"
    assert named_or_plain(plan, name, STUDENT) == "SoftLabels(T=4, alpha=0.9)"


def test_floors_of_a_curve_are_tuned_with_the_whole_budget(victim: Run) -> None:
    plan = plan_audit(victim, students=[STUDENT], device="cpu", curve=True, budget=60)
    floors = [job for job in plan.searched if str(job.attack) in CURVE_FLOORS]
    assert [job.budget for job in floors] == [60, 60]


def test_budgets_that_buy_a_thief_nothing_are_left_out(victim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undistill.auditing.curve.budgets", lambda images: [20, 60])
    plan = plan_audit(victim, attacks=["QuerySmoothing(k=20)"], students=[STUDENT], device="cpu", curve=True)
    jobs = curve_jobs(plan, plan.searched, str(plan.jobs[-1].attack), STUDENT)
    smoothed = [job for job in jobs if "QuerySmoothing" in str(job.attack)]
    assert {job.budget for job in smoothed} == {60}
    assert {len(job.data.train) for job in smoothed} == {3}
    assert {job.budget for job in jobs} == {20, 60}


def test_each_line_of_a_curve_has_the_settings_that_were_best_for_it(victim: Run) -> None:
    plan = plan_audit(victim, students=[STUDENT], device="cpu", curve=True)
    best = [configured(job, {"recipe.lr": 3.0 if job.side == "honest" else 0.3}) for job in plan.searched]
    jobs = curve_jobs(plan, best, "SoftLabels(T=4, alpha=0.9)", STUDENT)
    kinds = {(job.side, type(job.attack).__name__): job.recipe.lr / plan.jobs[0].recipe.lr for job in jobs}
    assert kinds == pytest.approx(
        {
            ("victim", "SoftLabels"): 0.3,
            ("honest", "SoftLabels"): 3.0,
            ("victim", "HardLabels"): 0.3,
            ("victim", "FixMatch"): 0.3,
        }
    )
    assert {job.listed for job in jobs} <= {job.column[1] for job in plan.searched}
    changed = [configured(job, {"T": 20.0}) if "SoftLabels" in job.column[1] else job for job in plan.searched]
    again = curve_jobs(plan, changed, "SoftLabels(T=4, alpha=0.9)", STUDENT)
    assert again[0].listed == "SoftLabels(T=4, alpha=0.9)", "as the suite lists it, however it was tuned"
    floors = {column[1].split("(")[0] for job in plan.searched if (column := job.column)}
    assert {"FixMatch", "HardLabels"} <= floors, "floors are tuned like the thief"
