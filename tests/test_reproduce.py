"""`undistill reproduce`: measured once, resumed, kept; and every experiment at smoke."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.conftest import toy_arrays
from undistill.attacks import Attack
from undistill.attacks.distillation.soft_labels import SoftLabels
from undistill.auditing.launchers import Serial
from undistill.cli import app
from undistill.core.errors import NonFinite, SpecError, StoreError
from undistill.core.identity import source_sha256
from undistill.data import Source
from undistill.defences import Defence
from undistill.models import Model
from undistill.papers.case import Case, Runner, Teacher
from undistill.papers.reproduce import EXPERIMENTS, find, reproduce, row_of
from undistill.papers.tables import table1
from undistill.report.table import Measured
from undistill.runs.run import Run
from undistill.training.recipe import Recipe


def teacher_of(data: object, model: str, recipe: Recipe) -> Teacher:
    return Teacher(Source.from_user(str(data)), Model.parse(model), recipe)


def case_of(
    name: str,
    teacher: Teacher,
    defence: str = "",
    adversary: Teacher | None = None,
    attack: str = "",
    student: str = "",
    recipe: Recipe | None = None,
    share: float = 1.0,
    published: float | None = None,
) -> Case:
    """A case from the texts of its specs."""
    return Case(
        name,
        teacher,
        Defence.parse(defence) if defence else None,
        adversary,
        Attack.parse(attack) if attack else None,
        Model.parse(student) if student else None,
        recipe or Recipe(),
        share,
        published,
    )


def test_the_authors_selection_is_another_table(toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    case = case_of("teacher", teacher_of(str(toy_file), "ConvNet(width=3)", recipe))
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: [case])
    runner = Runner(tmp_path, Serial())
    plain = reproduce("toy", "smoke", [0], "*", runner)
    leaky = reproduce("toy", "smoke", [0], "*", runner, select_on_test=True)
    assert {path.name for path in tmp_path.glob("*.json")} >= {"toy-smoke.json", "toy-selected-on-test-smoke.json"}
    runs = [Run.open(folder).record for folder in sorted((tmp_path / "teachers").iterdir())]
    (chosen,) = [run for run in runs if run["data"].startswith("Leaky(")]
    assert chosen["settings"]["recipe"]["selection"] == "best"
    (folder,) = [folder for folder in (tmp_path / "teachers").iterdir() if Run.open(folder).record == chosen]
    epochs = [json.loads(line)["validation_accuracy"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs[-1] < max(epochs), "or nothing is chosen"
    assert leaky[0].measured[0].accuracy == pytest.approx(100 * max(epochs)), "the epoch best on the test images"
    assert plain[0].measured[0].accuracy != plain[0].measured[0].validation_accuracy


def test_unknown_names_are_explained() -> None:
    with pytest.raises(SpecError, match="did you mean 'table1'"):
        find("tabel1")
    with pytest.raises(SpecError, match="did you mean 'small'"):
        reproduce("table1", "smal", [0], "*", Runner(Path("unused"), Serial()))
    with pytest.raises(SpecError, match="No value named 'ResNet-19 nasty'"):
        reproduce("table1", "smoke", [0], "ResNet-19 nasty", Runner(Path("unused"), Serial()))
    with pytest.raises(SpecError, match="Fashion-MNIST has no paper scale"):
        find("fashion")("paper")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 1 at `smoke`, from the command line."""
    out = tmp_path_factory.mktemp("reproduce")
    words = ["reproduce", "table1", "--scale", "smoke", "--seeds", "2", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert "Teachers here: ConvNet(width=8); students: ConvNet(width=2)." in done.stdout
    return out


def test_a_table_has_every_figure(folder: Path) -> None:
    record = json.loads((folder / "table1-smoke.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert rows.keys() == {case.name for case in table1("smoke")}
    assert all(row["measured"].keys() == {"0", "1"} for row in rows.values())
    assert rows["ResNet-18 nasty"]["measured"]["0"]["divergence"]
    assert rows["ResNet-18 normal"]["measured"]["0"]["divergence"] is None
    assert rows["ResNet-18 normal"]["measured"]["0"]["accuracy"] > 80
    assert rows["ResNet-18 normal"]["measured"]["0"]["train_accuracy"] > 80
    assert rows["Scratch / CNN"]["measured"]["0"]["train_accuracy"] is None
    assert "| ResNet-18 nasty |" in (folder / "table1-smoke.md").read_text()
    assert "torch" in (folder / "table1-smoke.md").read_text().splitlines()[2], "on what it was measured"


@pytest.fixture(scope="module")
def hurried_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hurried")


def hurried(case: Case) -> Case:
    """The same with one epoch for every training."""

    def teacher(one: Teacher) -> Teacher:
        return replace(one, recipe=one.recipe.model_copy(update={"epochs": 1}))

    adversary = teacher(case.adversary) if case.adversary else None
    return replace(
        case, teacher=teacher(case.teacher), adversary=adversary, recipe=case.recipe.model_copy(update={"epochs": 1})
    )


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "data-free"])  # which is measured below
def test_every_experiment_runs_on_digits(name: str, hurried_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [hurried(case) for case in find(name)("smoke")]
    monkeypatch.setitem(EXPERIMENTS, name, lambda scale: cases)
    rows = reproduce(name, "smoke", [0], "*", Runner(hurried_folder, Serial()))
    assert len(rows) == len(cases)
    assert all(row.accuracies or row.measured[0].diverged for row in rows)


def test_what_is_measured_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((folder / "table1-smoke.json").read_text())["rows"]
    monkeypatch.setattr("undistill.training.loop.Loop.one_round", None)
    reproduce("table1", "smoke", [0, 1], "*", Runner(folder, Serial()))
    assert json.loads((folder / "table1-smoke.json").read_text())["rows"] == before


def test_a_teacher_that_diverges_is_trained_once(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr("undistill.papers.case.train", lambda *asked, **_: trained.append(asked) or lost())
    teacher = teacher_of(str(toy_file), "ConvNet(width=3)", Recipe())
    cases = [
        case_of("normal", teacher),
        case_of("nasty", teacher, "Nasty(omega=0.1)"),
        case_of("no teacher", teacher, attack="Scratch()", student="ConvNet(width=2)", share=0.5),
    ]
    found = {case.name: one.diverged for case, one in Runner(tmp_path, Serial()).measure(cases, 0)}
    assert set(found) == {"normal", "nasty", "no teacher"}
    assert set(found.values()) == {"the honest ConvNet(width=3): NaN"}
    assert len(trained) == 1


def test_a_nasty_teacher_that_diverges_is_trained_once(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protected = []
    monkeypatch.setattr("undistill.papers.case.protect", lambda *asked, **_: protected.append(asked) or lost())
    teacher = teacher_of(str(toy_file), "ConvNet(width=3)", Recipe(epochs=1))
    shares = [
        case_of(f"{share:.0%}", teacher, "Nasty(omega=0.1)", None, "HardLabels()", "ConvNet(width=2)", Recipe(), share)
        for share in (0.5, 0.9, 1.0)
    ]
    found = {one.diverged for _, one in Runner(tmp_path, Serial()).measure(shares, 0)}
    assert found == {"the protected ConvNet(width=3): NaN"}
    assert len(protected) == 1


def lost() -> None:
    raise NonFinite("NaN")


def test_another_adversary_is_trained_and_used(toy_file: Path, tmp_path: Path) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    same, other = (teacher_of(str(toy_file), f"ConvNet(width={width})", recipe) for width in (3, 2))
    cases = [case_of(name, same, "Nasty(omega=0.1)", adversary=a) for name, a in (("own", None), ("other", other))]
    found = {case.name: measured for case, measured in Runner(tmp_path, Serial()).measure(cases, 0)}
    assert found["own"].divergence != found["other"].divergence
    assert len(list((tmp_path / "teachers").glob("convnet-*"))) == 2


def test_a_thief_with_fewer_images_asks_fewer_questions(toy_file: Path, tmp_path: Path) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    teacher = teacher_of(str(toy_file), "ConvNet(width=3)", recipe)
    case = case_of("", teacher, attack="HardLabels()", student="ConvNet(width=2)", recipe=recipe)
    queries = []
    for share in (1.0, 0.5):
        list(Runner(tmp_path, Serial()).measure([Case(**(vars(case) | {"share": share}))], 0))
        queries.append({json.loads(file.read_text())["queries"] for file in (tmp_path / "cells").glob("*.json")})
    (all_images,) = queries[0]
    (fewer,) = queries[1] - queries[0]
    assert fewer == pytest.approx(all_images / 2, rel=0.1)


def test_a_row_shows_its_spread_and_what_diverged() -> None:
    case = case_of("x", teacher_of("Digits()", "ConvNet()", Recipe()), published=82.46)

    def cells(*measured: Measured) -> list[str]:
        return row_of(case).model_copy(update={"measured": dict(enumerate(measured))}).cells()

    spread = [Measured(80.0 + seed, 9.0 + seed) for seed in range(3)]
    lost = Measured(0.0, diverged="NaN")
    assert cells(*spread) == ["x", "82.46", "81.0 ± 2.5", "3", "10.0"]
    assert cells(Measured(80.0)) == ["x", "82.46", "80.0", "1", ""]
    assert cells(Measured(80.0), lost)[2] == "80.0, 1 diverged"
    assert cells(lost)[2] == "1 diverged"


def test_a_narrower_call_keeps_what_the_table_holds(folder: Path) -> None:
    before = json.loads((folder / "table1-smoke.json").read_text())["rows"]
    rows = reproduce("table1", "smoke", [0], "ResNet-18 nasty", Runner(folder, Serial()))
    assert [len(row.measured) for row in rows] == [2]
    assert json.loads((folder / "table1-smoke.json").read_text())["rows"] == before


def test_a_changed_case_costs_no_figure(toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another published figure or name is the same case; another recipe is another one, and the old figure is kept."""
    recipe = find("table1")("smoke")[0].teacher.recipe
    teacher = teacher_of(str(toy_file), "ConvNet(width=3)", recipe)
    asked = [
        case_of(name, replace(teacher, model=Model.parse(f"ConvNet(width={width})")))
        for name, width in (("a", 2), ("b", 3))
    ]
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: asked)
    reproduce("toy", "smoke", [0, 1], "*", Runner(tmp_path, Serial()))

    def known(part: str) -> dict[str, int]:
        rows = json.loads((tmp_path / "toy-smoke.json").read_text())[part]
        return {row["name"]: len(row["measured"]) for row in rows}

    asked[0] = replace(asked[0], name="A", published=99.0)
    reproduce("toy", "smoke", [2], "A", Runner(tmp_path, Serial()))
    assert (known("rows"), known("earlier")) == ({"A": 3, "b": 2}, {})
    asked[1] = replace(asked[1], teacher=teacher, defence=Defence.parse("Nasty(omega=0.1)"))
    reproduce("toy", "smoke", [0], "b", Runner(tmp_path, Serial()))
    assert (known("rows"), known("earlier")) == ({"A": 3, "b": 1}, {"b": 2})
    asked[1] = replace(asked[1], defence=None)
    reproduce("toy", "smoke", [2], "b", Runner(tmp_path, Serial()))
    assert (known("rows"), known("earlier")) == ({"A": 3, "b": 3}, {"b": 1})


def test_what_diverges_is_a_result_and_stops_nothing(toy_file: Path, tmp_path: Path) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    wild = recipe.model_copy(update={"lr": 1e30, "clip": 0.0})
    sane, mad = (teacher_of(str(toy_file), "ConvNet(width=3)", how) for how in (recipe, wild))
    cases = [
        case_of("bad student", sane, attack="SoftLabels()", student="ConvNet(width=2)", recipe=wild),
        case_of("good student", sane, attack="SoftLabels()", student="ConvNet(width=2)", recipe=recipe),
        case_of("bad teacher", mad),
    ]
    for _again in range(2):
        found = {case.name: one for case, one in Runner(tmp_path, Serial()).measure(cases, 0)}
        assert [bool(one.diverged) for one in found.values()] == [True, False, True]
        assert found["good student"].accuracy > 30


def test_what_diverged_is_not_trained_again_by_the_same_code(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe.model_copy(update={"lr": 1e30, "clip": 0.0})
    case = case_of("teacher", teacher_of(str(toy_file), "ConvNet(width=3)", recipe))
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: [case])
    (before,) = reproduce("toy", "smoke", [0], "*", Runner(tmp_path, Serial()))
    trained = []
    monkeypatch.setattr(Runner, "honest", lambda *_: trained.append(1) or 1 / 0)
    (after,) = reproduce("toy", "smoke", [0], "*", Runner(tmp_path, Serial()))
    assert before.measured[0].diverged
    assert (after.measured, trained) == (before.measured, [])
    monkeypatch.setattr("undistill.papers.case.program_sha256", lambda file: "another revision")
    with pytest.raises(ZeroDivisionError):
        reproduce("toy", "smoke", [0], "*", Runner(tmp_path, Serial()))


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": null}', '{"rows": [3]}', '{"rows": [{"case": "x"}]}'])
def test_a_damaged_table_is_named_and_kept(content: str, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"command": "reproduce"}')
    table = tmp_path / "table1-smoke.json"
    table.write_text(content)
    with pytest.raises(StoreError, match=r"table1-smoke\.json is damaged, or no table .*Remove it"):
        reproduce("table1", "smoke", [0], "*", Runner(tmp_path, Serial()))
    assert table.read_text() == content


def test_a_folder_may_be_moved(toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    teacher, other = (teacher_of(str(toy_file), f"ConvNet(width={width})", recipe) for width in (3, 2))
    case = case_of("other", teacher, "Nasty(omega=0.1)", adversary=other)
    before = list(Runner(tmp_path / "here", Serial()).measure([case], 0))
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr("undistill.training.loop.Loop.one_round", None)
    assert list(Runner(tmp_path / "there", Serial()).measure([case], 0)) == before


def test_an_edited_attack_costs_its_own_figures_and_no_teacher(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=1)
    teacher = teacher_of(str(toy_file), "ConvNet(width=3)", recipe)
    attacks = ("", "SoftLabels()", "HardLabels()")
    cases = [case_of(attack, teacher, attack=attack, student="ConvNet(width=2)", recipe=recipe) for attack in attacks]
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: cases)

    def made() -> set[Path]:
        return {*tmp_path.glob("cells/*.json"), *tmp_path.glob("teachers/*")}

    before, known = reproduce("toy", "smoke", [0], "*", Runner(tmp_path, Serial())), made()
    for module in ("papers.case", "auditing.cell"):
        monkeypatch.setattr(
            f"undistill.{module}.source_sha256", lambda kind: source_sha256(kind) + "!" * (kind is SoftLabels)
        )
    after = reproduce("toy", "smoke", [0], "*", Runner(tmp_path, Serial()))
    assert [new.measured[0].code != old.measured[0].code for new, old in zip(after, before, strict=True)] == [0, 1, 0]
    assert [file.suffix for file in made() - known] == [".json"]


def test_other_images_under_the_same_name_cost_every_figure(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a damaged data set is repaired, values measured on the damaged one are not shown."""
    file = Path(shutil.copy(toy_file, tmp_path / "images.npz"))
    few = f"Npz(path='{file}', count=60)"  # of which each seed takes others
    recipe = Recipe(epochs=1)
    teacher = teacher_of(few, "ConvNet(width=3)", recipe)
    cases = [
        case_of("teacher", teacher),
        case_of("student", teacher, "", None, "HardLabels()", "ConvNet(width=2)", recipe),
    ]
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: cases)

    def codes() -> list[str]:
        rows = reproduce("toy", "smoke", [0, 1], "*", Runner(tmp_path / "out", Serial()))
        return [row.measured[seed].code for row in rows for seed in (0, 1)]

    before = codes()
    assert codes() == before
    np.savez(file, **toy_arrays(seed=1))
    after = codes()
    assert not set(after) & set(before)
    assert len(list((tmp_path / "out" / "teachers").iterdir())) == 4, "of each seed and each data set one"
    arrays = toy_arrays(seed=1)
    used = Source.parse(few).model_copy(update={"seed": 0}).load()
    seen = {image.tobytes() for part in (used.train, used.validation, used.test) for image in part.pixels.numpy()}
    unseen = next(n for n, image in enumerate(arrays["images"]) if image.tobytes() not in seen)
    arrays["images"][unseen] ^= 1
    np.savez(file, **arrays)
    assert codes()[::2] == after[::2], "seed 0 sees no change"


def test_edited_measuring_costs_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, case = Runner(tmp_path, Serial()), find("table1")("smoke")[0]
    before = runner.code(case, 0)
    monkeypatch.setattr("undistill.papers.case.program_sha256", lambda path: f"edited {path.name}")
    assert runner.code(case, 0) != before


def test_thieves_without_data_are_measured_on_digits(tmp_path: Path) -> None:
    rows = reproduce("data-free", "smoke", [0], "digits: normal*", Runner(tmp_path, Serial()))
    measured = {row.name: row.measured[0] for row in rows}
    attacks = " -> DAFL", " -> Fast", " -> DeepInversion"
    assert set(measured) == {f"digits: normal{attack}" for attack in ("", *attacks)}
    assert measured["digits: normal"].accuracy > 80
    for name, one in measured.items():
        assert bool(one.sheet) == ("->" in name)
        if "->" in name:
            assert one.accuracy > 15, "above chance, of 10 classes"
            assert (tmp_path / one.sheet).stat().st_size > 0, "a sheet of images for each student"
