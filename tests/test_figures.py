"""Figures from runs, audits and tables, on the command line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import RECIPE, STUDENT
from undistill.api import audit
from undistill.cli import app
from undistill.core.errors import DataError, FileError, StoreError
from undistill.core.files import sha256
from undistill.data import Source
from undistill.data.sheet import write_sheet
from undistill.report.curves import ablation, of_runs, training
from undistill.report.drawing import draw_named
from undistill.report.evidence import read_curve, read_evidence
from undistill.report.figures import students
from undistill.report.page import read_report
from undistill.report.table import Measured, Row, Table, write_table
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.runs.train import train


def figure(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["figure", *map(str, words)])
    return done.exit_code, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(victim: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit with an attack that makes images."""
    out = tmp_path_factory.mktemp("audits") / "audit"
    attack = "DeepInversion(count=20, steps=3)"
    audit(victim, out, attacks=[attack], students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")
    return out


def written(path: Path, rows: dict[str, list[float]], divergence: dict[str, list[float]] | None = None) -> Path:
    """A table of these accuracies, by row and seed, and of some rows' divergences."""
    reached = divergence or {}
    lines = []
    for name, accuracies in rows.items():
        known = reached.get(name, [None] * len(accuracies))
        lines.append(Row(name=name, measured=dict(enumerate(map(Measured, accuracies, known)))))
    write_table(path, Table(rows=lines))
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = {
        f"omega={value}: {who}": [base - 100 * value, base - 90 * value]
        for value in (0, 0.01, 0.1)
        for who, base in (("teacher", 99.0), ("student", 80.0))
    }
    divergence = {f"omega={value}: teacher": [200 * value, 200 * value + 1] for value in (0, 0.01, 0.1)}
    path = tmp_path_factory.mktemp("tables") / "omega-small.json"
    return written(path, rows | {"no teacher": [70.0]}, divergence)


@pytest.mark.parametrize("name", ["answers", "maps", "students", "synthesised"])
def test_figures_of_an_audit(name: str, folder: Path) -> None:
    code, said = figure(name, folder)
    assert code == 0, said
    assert (folder / f"{name}.svg").read_text().startswith("<svg")
    with Image.open(folder / f"{name}.png") as picture:
        assert min(picture.size) > 200


def test_every_student_has_a_panel_with_its_own_floors(folder: Path) -> None:
    report = read_report(folder)
    others = [cell.model_copy(update={"student": "Other()", "accuracy": 0.5}) for cell in report.cells]
    both = students(report.model_copy(update={"cells": [*report.cells, *others]}))
    first, second = both.axes
    assert ("ConvNet" in first.get_xlabel(), "Other()" in second.get_xlabel()) == (True, True)
    assert [text.get_text() for text in first.get_yticklabels()] == [t.get_text() for t in second.get_yticklabels()]
    floors = [line for line in second.lines if line.get_linestyle() in ("--", ":")]
    assert [line.get_xdata()[0] for line in floors] == pytest.approx([50, 50])


def test_made_images_are_in_the_report(folder: Path) -> None:
    sheets = read_evidence(folder / "evidence.npz").sheets
    assert [name.split(" from ")[1] for name in sheets] == ["the protected", "the unprotected"]
    assert "Images that were made from the networks alone" in (folder / "report.html").read_text()


def test_training_shows_accuracy_and_the_divergence_of_what_undermines(honest: Run, victim: Run) -> None:
    above, below = training(of_runs([honest, victim])).axes
    assert [line.get_label() for line in above.lines] == ["honest", "victim"]
    assert len(above.lines[0].get_xdata()) == RECIPE.epochs
    (drawn,) = below.lines
    rows = [json.loads(line) for line in (victim.folder / "metrics.jsonl").read_text().splitlines()]
    assert drawn.get_ydata()[-1] == pytest.approx(-rows[-1]["undermining"])


def test_the_report_shows_how_both_were_trained(folder: Path) -> None:
    curves = read_evidence(folder / "evidence.npz").curves
    assert {name: len(curve) for name, curve in curves.items()} == {
        "unprotected": RECIPE.epochs,
        "protected": RECIPE.epochs,
    }
    assert "How the two models were trained" in (folder / "report.html").read_text()


def test_a_damaged_or_edited_record_of_training_is_left_out(
    victim: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The audit that would draw it has taken hours."""
    copy = Path(shutil.copytree(victim.folder, tmp_path / "copy"))
    assert read_curve(Run.open(copy)) is not None
    edited = (copy / "metrics.jsonl").read_text().replace("0.", "0.1", 1)
    record = json.loads((copy / "run.json").read_text())
    huge = '{"validation_accuracy": 0.5, "undermining": 1' + "0" * 400 + "}"
    contents = [
        "{",
        "3",
        '{"epoch": 1}',
        '{"validation_accuracy": NaN}',
        '{"validation_accuracy": 1e999}',
        huge,
        "[" * 9999,
    ]
    for content in (edited, *contents):
        (copy / "metrics.jsonl").write_text(content)
        for forged in (False, True):
            known = {"metrics_sha256": sha256(copy / "metrics.jsonl")} if forged else {}
            (copy / "run.json").write_text(json.dumps(record | known))
            caplog.clear()
            if content != edited or not forged:
                assert read_curve(Run.open(copy)) is None
                assert "metrics.jsonl is damaged or was edited; its curve is left out" in caplog.text
    with pytest.raises(StoreError, match="has no epochs to draw"):
        draw_named("training", [copy])


def test_an_ablation_has_a_line_for_each_series(table: Path) -> None:
    axes, below = ablation(table).axes
    assert below.get_xlabel() == "omega"
    assert np.allclose(below.lines[0].get_ydata(), [0.5, 2.5, 20.5]), "divergence, mean of the seeds"
    lines = {line.get_label(): line for line in axes.lines}
    assert lines.keys() == {"teacher", "student", "no teacher"}
    assert np.allclose(lines["student"].get_ydata(), [80, 79.05, 70.5])
    assert np.allclose(lines["student"].get_xdata(), [0, 0.01, 0.1])
    assert len(axes.collections) == 2, "bands"


def test_a_value_with_one_seed_leaves_the_band_of_the_others(tmp_path: Path) -> None:
    rows = {f"omega={value}: student": [80.0, 82.0][: 2 - value // 2] for value in (0, 1, 2)}
    (axes,) = ablation(written(tmp_path / "table.json", rows)).axes
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 0].max() == 1


def test_shares_are_values_too(tmp_path: Path) -> None:
    rows = {f"{share}%: KD from nasty": [float(share)] for share in (10, 90)}
    (axes,) = ablation(written(tmp_path / "samples.json", rows)).axes
    assert (axes.get_xlabel(), axes.lines[0].get_label()) == ("share of the images, %", "KD from nasty")


def test_an_ablation_over_words_keeps_their_order(tmp_path: Path) -> None:
    rows = {f"adversary={name}: student": [80.0] for name in ("VGG(width=8)", "PlainCNN()")}
    figure = ablation(written(tmp_path / "table.json", rows))
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["VGG(width=8)", "PlainCNN()"]
    assert figure.axes[0].get_xlabel() == "adversary"


def test_levels_are_told_apart_without_colour(tmp_path: Path) -> None:
    rows = {name: [80.0] for name in ("no teacher", "normal teacher", "KD: normal", "T=4: nasty")}
    ablation(written(tmp_path / "table.json", rows)).savefig(tmp_path / "levels.svg")
    dashes = re.findall(r"stroke-dasharray: ([^;]+);", (tmp_path / "levels.svg").read_text())
    assert len(set(dashes)) == 3, "of the levels; the series is solid"


def test_runs_of_one_name_are_told_apart(honest: Run, victim: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(victim.folder, tmp_path / "honest"))
    above = training(of_runs([honest, Run.open(copy)])).axes[0]
    assert [line.get_label() for line in above.lines] == [str(honest.folder), str(copy)]
    assert above.lines[0].get_ydata()[-1] == pytest.approx(100 * honest.record["metrics"]["validation_accuracy"])


@pytest.mark.parametrize(
    "name", ["ResNet-18 nasty -> SoftLabels / CNN", "lr / 10: normal", "PlainCNN(width=16): student"]
)
def test_a_digit_in_a_name_is_no_value(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no ablation"):
        ablation(written(tmp_path / "table.json", {name: [50.0]}))


@pytest.mark.parametrize("name", ["ablation", "synthesised"])
@pytest.mark.parametrize(
    "row",
    [
        {},
        {"name": 3},
        {"name": "omega=1: a", "measured": {"0": {"accuracy": "x"}}},
        {"name": "a", "measured": {"0": {"accuracy": 1, "sheet": 5}}},
        3,
    ],
    ids=str,
)
def test_a_damaged_table_is_named(row: object, name: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(StoreError, match=r"no table of 'undistill reproduce' \(rows\.0"):
        draw_named(name, [tmp_path / "table.json"])


def test_a_series_that_diverged_altogether_is_left_out(tmp_path: Path) -> None:
    lines = [
        Row(name=f"omega={value}: {who}", measured={0: Measured(80.0 - value, diverged=diverged)})
        for value in (1, 2)
        for who, diverged in (("teacher", "NaN"), ("student", ""))
    ]
    write_table(tmp_path / "table.json", Table(rows=lines))
    assert [line.get_label() for line in ablation(tmp_path / "table.json").axes[0].lines] == ["student"]
    write_table(tmp_path / "table.json", Table(rows=[line for line in lines if "teacher" in line.name]))
    with pytest.raises(StoreError, match="holds no ablation"):
        ablation(tmp_path / "table.json")


def test_what_does_not_undermine_has_no_divergence_to_draw(honest: Run) -> None:
    (axes,) = training(of_runs([honest])).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation accuracy, %")


def test_bad_words_are_explained(folder: Path, honest: Run, tmp_path: Path) -> None:
    for words, said in {
        ("answer", folder): "did you mean 'answers'",
        ("answers", folder, folder): "shows one thing; 2 were named",
        ("answers", honest.folder): "its honest twin is unknown",
        ("answers", tmp_path): "is no run of undistill",
        ("answers", honest.folder, honest.folder, honest.folder): "compares two runs; 3 were named",
        ("synthesised", honest.folder): "evidence.npz is missing",
        ("synthesised", tmp_path / "no.json"): "There is no table",
        ("training", folder): "is the folder of another command (audit)",
        ("ablation", tmp_path / "no.json"): "There is no table",
    }.items():
        code, answer = figure(*words)
        assert (code, said in answer) == (2, True), answer


@pytest.mark.parametrize("name", ["answers", "maps"])
def test_figures_of_two_runs_and_of_a_victim_alone(name: str, honest: Run, victim: Run, tmp_path: Path) -> None:
    for number, sources in enumerate([(victim.folder,), (honest.folder, victim.folder)]):
        code, said = figure(name, *sources, "--out", tmp_path / str(number))
        assert code == 0, said
    assert (tmp_path / "0.svg").read_bytes() == (tmp_path / "1.svg").read_bytes()


def test_a_figure_may_go_into_a_folder_or_make_one(table: Path, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for out in ("figures", "new/omegas.svg"):
        code, said = figure("ablation", table, "--out", tmp_path / out)
        assert code == 0, said
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert made == {"figures/omega-small.svg", "figures/omega-small.png", "new/omegas.svg", "new/omegas.png"}


@pytest.mark.parametrize("name", ["answers", "maps"])
def test_networks_of_different_data_are_not_compared(name: str, honest: Run, toy_file: Path, tmp_path: Path) -> None:
    source = Source.parse(str(toy_file)).model_copy(update={"seed": 5})
    other = train(source, STUDENT, tmp_path / "other", settings=TrainSettings(recipe=RECIPE))
    code, said = figure(name, honest.folder, other.folder)
    assert (code, "different data" in " ".join(said.split())) == (2, True), said


def test_sheets_of_a_table_go_by_its_rows(tmp_path: Path) -> None:
    image = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    write_sheet(tmp_path / "x.png", image, columns=1)
    rows = [
        Row(name="nasty -> DAFL", measured={0: Measured(50.0, sheet="x.png")}),
        Row(name="nasty", measured={0: Measured(90.0)}),
    ]
    write_table(tmp_path / "table.json", Table(rows=rows))
    shown = [axes for axes in draw_named("synthesised", [tmp_path / "table.json"]).axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["nasty -> DAFL"]
    assert shown[0].images[0].get_array().min() == 200
    (tmp_path / "x.png").unlink()
    with pytest.raises(DataError, match=r"x\.png cannot be read: No such file"):
        draw_named("synthesised", [tmp_path / "table.json"])
    for sheet in ("../x.png", "/etc/passwd", "a\\b", "x\0"):
        write_table(tmp_path / "table.json", Table(rows=[Row(name="x", measured={0: Measured(50.0, sheet=sheet)})]))
        with pytest.raises(FileError, match="leads out of"):
            draw_named("synthesised", [tmp_path / "table.json"])


def test_a_sheet_shows_images_in_rows(tmp_path: Path) -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 3, 4) * 50
    write_sheet(tmp_path / "sheet.png", images, columns=2)
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 * (2 * 3 + 2), 2 * (2 * 4 + 2))
    assert [pixels[8 * (n // 2), 10 * (n % 2)] for n in range(6)] == [0, 50, 100, 150, 200, 255]
