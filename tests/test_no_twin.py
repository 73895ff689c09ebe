"""Audits of a model of which no unprotected twin is known."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import RECIPE, STUDENT
from undistill.api import audit
from undistill.auditing.schema import Report
from undistill.cli.commands import app
from undistill.report.page import read_report
from undistill.runs.run import Run


@pytest.fixture(scope="module")
def apart(victim: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    audit(victim, out, honest="none", students=[STUDENT], seeds=2, recipe=RECIPE, device="cpu")
    return out


def test_it_has_floors_and_theft_and_says_what_is_lost(apart: Path) -> None:
    report = read_report(apart)
    assert {cell.side for cell in report.cells} == {"victim", "none"}
    assert report.honest is report.twin is report.costs is report.verdict.damage is report.verdict.cost is None
    assert report.verdict.leak_hard.high is not None
    assert "Without an unprotected twin it is not assessed" in report.verdict.sentence
    assert "no_twin" in [flag.name for flag in report.flags]


def test_its_students_are_those_of_an_audit_with_the_twin(apart: Path, victim: Run, tmp_path: Path) -> None:
    cells = apart / "cells"
    whole = audit(victim, tmp_path, students=[STUDENT], seeds=2, recipe=RECIPE, device="cpu", cells=cells)
    own = {cell.column: cell.accuracy for cell in read_report(apart).cells}
    assert own == {cell.column: cell.accuracy for cell in whole.cells if cell.side != "honest"}


def test_its_pages_name_no_second_model(apart: Path) -> None:
    html, markdown = (apart / "report.html").read_text(), (apart / "report.md").read_text()
    for name in ("unprotected:", "from the unprotected", "Divergence"):
        assert name not in html + markdown
    assert "| accuracy |" in markdown


def test_the_command_line_takes_none(victim: Run, tmp_path: Path) -> None:
    words = ["audit", str(victim.folder), "--honest", "none", "--student", STUDENT, "--seeds", "1"]
    said = CliRunner().invoke(app, [*words, "--set", "recipe.epochs=1", "--out", str(tmp_path)], env={"COLUMNS": "80"})
    assert said.exit_code == 0, said.output
    assert "unprotected model itself" not in said.output


@pytest.mark.parametrize("field", ["honest", "costs", "divergence"])
def test_half_a_twin_is_refused(apart: Path, report: Report, field: str) -> None:
    values = json.loads(report.model_dump_json()) | {field: None}
    with pytest.raises(ValueError, match=r"of an honest twin it says .*, and not"):
        Report.model_validate(values)
