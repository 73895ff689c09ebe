"""`compare`: several defences of one network, one suite, one table; students in common are trained once."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from tests.conftest import FAST, RECIPE, STUDENT
from undistill.api import audit, compare
from undistill.api.comparisons import rows_of
from undistill.auditing.comparison import NONE, Comparison, objections, parse_defences, row_name
from undistill.auditing.schema import Flag, Interval, Report
from undistill.cli.commands import app
from undistill.core.errors import SpecError, StoreError, UndistillError
from undistill.defences import Defence
from undistill.report.comparison import COLUMNS, front, pareto, read_comparison
from undistill.report.page import read_report
from undistill.runs.run import Run
from undistill.runs.settings import Settings

PUBLISHED = sorted((Path(__file__).parents[1] / "docs/results/comparisons").glob("*.json"))
DEFENCES = ["LabelOnly()", "Nasty(omega=0.05, T=4) + Sealed(levels=2)"]
QUICK = {"suite": "quick-2", "students": [STUDENT], "recipe": RECIPE.model_copy(update={"epochs": 3}), "seeds": 2}


@pytest.fixture(scope="module")
def done(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("compare") / "out"
    settings = Settings(recipe=RECIPE)
    return compare(honest, DEFENCES, out, settings=settings, by="me", device="cpu", **QUICK), out


def test_a_row_for_each_defence_and_one_without(done: tuple[Comparison, Path]) -> None:
    comparison, out = done
    assert [row.defence for row in comparison.rows] == [
        NONE,
        "LabelOnly()",
        "Nasty(omega=0.05) + Sealed(levels=2)",
    ]
    plain, label_only, sealed = comparison.rows
    assert plain.cost.mean == plain.ece == plain.divergence == 0
    assert plain.bits is None
    assert label_only.bits == 0
    assert sealed.bits is not None
    assert sealed.bits <= 1
    for row in comparison.rows:
        report = read_report(out / row.folder)
        assert row.leak_hard == report.verdict.leak_hard
        assert row.victim == report.victim
        assert len(row.accuracies) == 6
        assert len(row.beyond) == 4, "attacks that ask; students without teacher are read beside them"
        assert row.beyond["HardLabels() by " + STUDENT].mean == 0
    assert read_comparison(out) == comparison


def test_students_in_common_are_trained_once(done: tuple[Comparison, Path], honest: Run) -> None:
    """The unprotected network is the victim of the first row and the twin of all; who asks nobody has no victim."""
    _, out = done
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    trained = [cell for cell in cells if "accuracy" in cell.get("content", cell)]
    asking, alone, seeds, networks = 4, 2, 2, 3
    assert len(trained) == seeds * (alone + asking * networks)


def test_cells_are_shared_with_a_single_audit(done: tuple[Comparison, Path], honest: Run, tmp_path: Path) -> None:
    comparison, out = done
    before = {path.name for path in (out / "cells").iterdir()}
    victim = next(path for path in (out / "victims").iterdir() if path.name.startswith("labelonly"))
    report = audit(victim, tmp_path / "audit", honest=honest, cells=out / "cells", device="cpu", **QUICK)
    assert {path.name for path in (out / "cells").iterdir()} == before, "nothing was trained anew"
    assert report.verdict.leak_hard == comparison.rows[1].leak_hard
    assert not (tmp_path / "audit" / "cells").exists()


def test_a_repeated_comparison_is_the_same_bytes(done: tuple[Comparison, Path], honest: Run) -> None:
    _, out = done
    before = (out / "comparison.json").read_bytes()
    compare(honest, DEFENCES, out, settings=Settings(recipe=RECIPE), by="me", device="cpu", **QUICK)
    assert (out / "comparison.json").read_bytes() == before


def test_the_page_needs_no_network_and_can_be_sorted(done: tuple[Comparison, Path]) -> None:
    _, out = done
    page = (out / "comparison.html").read_text()
    assert not re.search(r"""(?:src|href)=["']?https?://""", page)
    assert page.count('<th scope="col" class="n">') == len(COLUMNS)
    assert "<button" not in page, "without JavaScript there is nothing to press"
    for row in done[0].rows:
        assert f'href="{row.folder}/report.html"' in page
        assert (out / row.folder / "report.html").exists()
    assert "| LabelOnly() |" in (out / "comparison.md").read_text().replace("\\", "")


def test_the_schema_is_that_of_the_documents() -> None:
    held = json.loads((Path(__file__).parents[1] / "docs" / "comparison.schema.json").read_text())
    assert held == Comparison.model_json_schema(), "run 'make schema'"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_comparisons_can_be_read(path: Path) -> None:
    found = Comparison.model_validate_json(path.read_text())
    assert len(found.rows) == len({row.defence for row in found.rows}) > 2
    for row in found.rows:
        assert row_name([Defence.parse(one) for one in parse_defences(row.defence)]) == row.defence


def test_a_price_is_drawn_where_it_is(done: tuple[Comparison, Path]) -> None:
    """Once, those that cost the same were moved aside, by several points where one network was ruined."""
    rows = done[0].rows
    ruined = rows[-1].model_copy(update={"cost": Interval(mean=0.3, low=0.2, high=0.4, n=40)})
    for axes, heights in zip(pareto([*rows, ruined]).axes, ("leak_hard", "damage"), strict=True):
        drawn = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() in ("o", "D")]
        assert drawn == [(100 * row.cost.mean, 100 * getattr(row, heights).mean) for row in [*rows, ruined]]


def test_the_figure_is_drawn_on_its_own(done: tuple[Comparison, Path], tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["figure", "pareto", str(done[1]), "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    drawn = (tmp_path / "pareto.svg").read_text()
    assert "price: accuracy lost, points" in drawn
    assert "Nasty(omega=0.05) + Sealed(levels=2)" in drawn
    assert CliRunner().invoke(app, ["figure", "pareto", str(tmp_path)]).exit_code == 2


def test_no_other_defence_beats_those_on_the_front() -> None:
    assert front([0, 1, 2, 1], [5, 3, 4, 2]) == [0, 3]
    assert front([0, 0], [2, 1]) == [1]
    assert front([], []) == []


def test_defences_of_a_row_are_separated_by_plus() -> None:
    assert parse_defences("Nasty(price=0.5) + Sealed(levels=4)") == ["Nasty(price=0.5)", "Sealed(levels=4)"]
    assert parse_defences("a+b.py:Mine(x='1 + 2') + TopK(k=1)") == ["a+b.py:Mine(x='1 + 2')", "TopK(k=1)"]
    assert parse_defences("TopK(k=1)+LabelOnly()") == ["TopK(k=1)", "LabelOnly()"]
    assert parse_defences("None") == []
    for text in ("", "TopK() +", "+"):
        with pytest.raises(SpecError, match="write one defence, or several"):
            parse_defences(text)


def test_what_cannot_be_done_is_said_before_anything_is(honest: Run, tmp_path: Path) -> None:
    for rows, match in (
        (["LabelOnly()", "Sealed() + Nasty()"], "name Nasty first"),
        (["LabelOnly()", "Sealed(levels=64)"], "needs 64 of them"),
        (["LabelOnly()", "MAD(surrogate='Nothing()')"], "No model named 'Nothing'"),
        (["LabelOnly()", "Nasty(price=100)"], "more than the accuracy there is"),
    ):
        with pytest.raises(UndistillError, match=match):
            compare(honest, rows, tmp_path / "out", device="cpu", **QUICK)
        assert not (tmp_path / "out").exists()


def test_one_defence_is_one_row_however_it_is_written(honest: Run) -> None:
    assert list(rows_of(honest, ["LabelOnly", "LabelOnly()", "Sealed()", "Sealed(levels=4)", "none"], None)) == [
        NONE,
        "LabelOnly()",
        "Sealed()",
    ]
    row = [Defence.parse("Nasty(price=2)"), Defence.parse("TopK(k=1)")]
    assert row_name(row) == "Nasty(price=2) + TopK(k=1)"
    assert [Defence.parse(text) for text in parse_defences(row_name(row))] == row


def test_what_cannot_be_shipped_costs_more_than_was_stated(done: tuple[Comparison, Path]) -> None:
    report = read_report(done[1] / done[0].rows[0].folder)

    def costing(low: float, price: float | None) -> Report:
        cost = Interval(mean=low + 0.01, low=low, high=low + 0.02, n=100)
        verdict, pair = (
            report.verdict.model_copy(update={"cost": cost}),
            report.pairs[0].model_copy(update={"price": price}),
        )
        return report.model_copy(update={"verdict": verdict, "pairs": [pair], "flags": []})

    assert objections(costing(0.004, None)) == []
    assert objections(costing(0.006, None)) == ["costs at least 0.6 points of accuracy, more than 0.5"]
    assert objections(costing(0.018, 2.0)) == []
    flagged = costing(0.0, None).model_copy(update={"flags": [Flag(name="miscalibrated", message="")]})
    assert objections(flagged) == ["miscalibrated"]


def test_a_page_links_to_nothing_else_than_its_reports(done: tuple[Comparison, Path]) -> None:
    known = done[0].model_dump()
    known["rows"][0]["folder"] = "javascript:alert(1)//"
    with pytest.raises(ValidationError):
        Comparison.model_validate(known)


def test_the_command_line_ends_with_a_table(done: tuple[Comparison, Path], honest: Run) -> None:
    _, out = done
    shown = CliRunner().invoke(app, ["report", str(out)], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    assert "LabelOnly()" in shown
    arguments = [part for setting in FAST for part in ("--set", setting)]
    dry = CliRunner().invoke(app, ["compare", str(honest.folder), "--defence", "Sealed()", "--dry-run", *arguments])
    assert dry.exit_code == 0, dry.output
    assert "1 defence to train and calibrate" in " ".join(dry.output.split())
    assert "are there" not in dry.output, "nothing is, in an empty folder"
    wrong = CliRunner().invoke(app, ["compare", str(honest.folder), "--defence", "Seeled()"])
    assert wrong.exit_code == 2


def test_two_audits_do_not_work_in_the_same_cells(done: tuple[Comparison, Path], honest: Run, tmp_path: Path) -> None:
    from filelock import FileLock

    _, out = done
    with FileLock(out / "cells" / ".lock"), pytest.raises(StoreError, match="Another audit is working in"):
        audit(honest, tmp_path / "a", honest=honest, cells=out / "cells", device="cpu", **QUICK)
