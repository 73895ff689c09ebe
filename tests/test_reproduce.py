"""Experiments of the paper: what they hold, that they resume, and one of them on digits from the command line."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from undistill.attacks import Attack
from undistill.cli import app
from undistill.data import Source
from undistill.defences import Defence
from undistill.errors import NonFiniteLoss, SpecError, StoreError
from undistill.fit import Recipe
from undistill.launch import Serial
from undistill.models import Model
from undistill.reproduce.case import Case, Measured, Teacher, Workshop
from undistill.reproduce.run import EXPERIMENTS, Row, about, find, reproduce, selected_on_test
from undistill.reproduce.scales import SCALES, Scale, setting
from undistill.reproduce.tables import table1
from undistill.store import Run
from undistill.views import Views

EXISTING = [
    (name, scale)
    for name in EXPERIMENTS
    for scale in SCALES
    if not (scale == "paper" and name == "fashion") and not (scale == "small" and name == "table3")
]


@pytest.mark.parametrize(("name", "scale"), EXISTING)
def test_every_experiment_is_made_of_what_there_is(name: str, scale: Scale) -> None:
    cases = find(name)(scale)
    assert len({case.name for case in cases}) == len(cases), "a figure's name is its row"
    for case in cases:
        assert Source.parse(case.teacher.data)
        assert Model.parse(case.teacher.model)
        assert not case.defence or Defence.parse(case.defence)
        assert bool(case.attack) == bool(case.student)
        if case.attack:
            assert Attack.parse(case.attack)
            assert Model.parse(case.student)


ABLATED: dict[str, Callable[[Case], object]] = {
    "omega": lambda case: f"omega={Defence.parse(case.defence).omega:g}",
    "published-omegas": lambda case: f"omega={Defence.parse(case.defence).omega:g}",
    "adversary-temperature": lambda case: f"T_A={Defence.parse(case.defence).T:g}",
    "adversary": lambda case: f"adversary={(case.adversary or case.teacher).model}",
    "temperature": lambda case: f"T={Attack.parse(case.attack).T:g}",
    "alpha": lambda case: f"alpha={Attack.parse(case.attack).alpha:g}",
    "samples": lambda case: f"{case.share:.0%}",
    "student-epochs": lambda case: f"epochs={case.recipe.epochs}",
}
"""How a row's name says what was varied."""


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ABLATED)
def test_an_ablation_varies_what_its_rows_say(name: str, scale: Scale) -> None:
    cases = [case for case in find(name)(scale) if ": " in case.name and not case.name.startswith("KD")]
    assert [ABLATED[name](case) for case in cases] == [case.name.partition(": ")[0] for case in cases]
    assert len({case.name.partition(": ")[0] for case in cases}) >= (2 if name == "published-omegas" else 3)


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("name", ["collapse", "nan"])
def test_no_two_trainings_of_an_experiment_are_the_same(name: str, scale: Scale) -> None:
    cases = [replace(case, name="") for case in find(name)(scale)]
    assert len({repr(case) for case in cases}) == len(cases)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_what_it_expects_and_takes(name: str) -> None:
    said = about(find(name))
    assert any(word in said for word in ("Expected", "expected", "The paper", "Published", "Ours"))
    for scale in ("small", "paper"):
        assert bool(re.search(rf"`{scale}` (about )?[\d,]+", said)) == ((name, scale) in EXISTING)


def test_paper_is_the_published_schedule() -> None:
    """method.md, section 1: SGD 0.1, momentum 0.9, weight decay 5e-4, batch 128, drops in epochs."""
    for data, epochs, drops, gamma, omega, T in (
        ("CIFAR-10", 160, (80, 120), 0.1, 0.04, 4),
        ("CIFAR-100", 200, (60, 120, 160), 0.2, 0.005, 20),
        ("Tiny-ImageNet", 200, (60, 120, 160), 0.2, 0.01, 20),
    ):
        chosen = setting(data, "paper")
        recipe = chosen.recipe
        assert (recipe.epochs, recipe.lr, recipe.momentum, recipe.weight_decay) == (epochs, 0.1, 0.9, 5e-4)
        assert (recipe.batch_size, recipe.optimiser, recipe.gamma, recipe.clip) == (128, "sgd", gamma, 0)
        assert tuple(round(drop * epochs) for drop in recipe.drops) == drops
        assert (chosen.omega, chosen.T, chosen.alpha, chosen.warm_start) == (omega, T, 0.9, None)
        turned = data == "Tiny-ImageNet"
        views = Views(crop=0 if turned else 0.125, flip=True, rotate=20 if turned else 0)
        trained = [recipe, *(student.recipe for name, student in chosen.students.items() if name != "CNN")]
        assert all(one == recipe for one in trained)
        assert recipe.views == views
    cnn = setting("CIFAR-10", "paper").students["CNN"].recipe
    assert (cnn.epochs, cnn.optimiser, cnn.lr, cnn.weight_decay, cnn.drops) == (100, "adamw", 1e-3, 0, ())


# method.md, section 1: figures of the rows, then by columns
PUBLISHED = {
    ("table1", "CNN ResNetC-20 ResNetC-32 ResNet-18"): {
        "Scratch": "86.64 92.28 93.04 95.13",
        "ResNet-18 normal": "95.13 87.75 92.49 93.31 95.39",
        "ResNet-18 nasty": "94.56 82.46 88.01 89.69 93.41",
    },
    ("table2", "ShuffleNetV2 MobileNetV2 ResNet-18 ResNet-50 ResNeXt-29"): {
        "Scratch": "71.17 69.12 77.44",
        "ResNet-18 normal": "77.44 74.24 73.11 79.03",
        "ResNet-18 nasty": "77.42 64.49 3.45 74.81",
        "ResNet-50 normal": "78.12 74.00 72.81 79.65 80.02",
        "ResNet-50 nasty": "77.14 63.16 3.36 71.94 75.03",
        "ResNeXt-29 normal": "81.85 74.50 72.43 80.84 - 83.53",
        "ResNeXt-29 nasty": "80.26 58.99 1.55 68.52 - 75.08",
    },
    ("table3", "ShuffleNetV2 MobileNetV2 ResNet-18 ResNet-50 ResNeXt-29"): {
        "Scratch": "55.74 51.72 58.73",
        "ResNet-18 normal": "58.73 58.09 55.99 61.45",
        "ResNet-18 nasty": "57.77 23.16 1.82 44.73",
        "ResNet-50 normal": "62.01 58.01 54.18 62.01 63.91",
        "ResNet-50 nasty": "60.06 41.84 1.41 48.24 51.27",
        "ResNeXt-29 normal": "62.81 57.87 54.34 62.38 - 64.22",
        "ResNeXt-29 nasty": "60.21 42.73 1.09 54.53 - 59.54",
    },
}


@pytest.mark.parametrize(("table", "columns"), PUBLISHED)
def test_the_tables_hold_the_published_figures(table: str, columns: str) -> None:
    expected = {}
    for row, figures in PUBLISHED[table, columns].items():
        names = [f"{row} -> SoftLabels / {column}" for column in columns.split()]
        if row == "Scratch":
            names = [f"Scratch / {column}" for column in columns.split()]
        else:
            names.insert(0, row)
        expected |= {name: float(f) for name, f in zip(names, figures.split(), strict=False) if f != "-"}
    cases = find(table)("paper")
    assert {case.name: case.published for case in cases if case.published is not None} == expected
    assert all("HardLabels" in case.name for case in cases if case.published is None)
    assert all(case.published is None for case in find(table)("smoke")), "digits are not what was published"


def test_the_data_free_table_holds_the_published_figures() -> None:
    known = {case.name: case.published for case in find("data-free")("paper") if case.published is not None}
    for data, normal, its_student, nasty, its_own in (
        ("CIFAR-10", 95.42, 92.49, 94.54, 86.15),
        ("CIFAR-100", 76.97, 71.06, 76.12, 65.67),
    ):
        assert [known.pop(f"{data}: {name}") for name in ("normal", "normal -> DAFL")] == [normal, its_student]
        assert [known.pop(f"{data}: {name}") for name in ("nasty", "nasty -> DAFL")] == [nasty, its_own]
    assert not known


@pytest.mark.parametrize("scale", SCALES)
def test_weaker_and_stronger_are_named_rightly(scale: Scale) -> None:
    chosen = setting("CIFAR-10", scale)
    sizes = []
    for model in (chosen.weaker, chosen.teacher().model, chosen.stronger):
        network = Model.parse(model).build((3, 32, 32), 10, 0)
        sizes.append(sum(weights.numel() for weights in network.parameters()))
    assert sizes == sorted(set(sizes))


def test_the_authors_selection_is_another_table(toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    case = Case("teacher", Teacher(str(toy_file), "ConvNet(width=3)", recipe))
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: [case])
    workshop = Workshop(tmp_path, Serial())
    plain = reproduce("toy", "smoke", [0], "*", workshop)
    leaky = reproduce("toy", "smoke", [0], "*", workshop, as_authors=True)
    assert {path.name for path in tmp_path.glob("*.json")} >= {"toy-smoke.json", "toy-selected-on-test-smoke.json"}
    runs = [Run.open(folder).record for folder in sorted((tmp_path / "teachers").iterdir())]
    (chosen,) = [run for run in runs if run["data"].startswith("Leaky(")]
    assert chosen["settings"]["recipe"]["selection"] == "best"
    assert leaky[0].measured[0].accuracy == leaky[0].measured[0].validation_accuracy, "chosen by what it is measured on"
    assert plain[0].measured[0].accuracy != plain[0].measured[0].validation_accuracy


def test_unknown_names_are_explained() -> None:
    with pytest.raises(SpecError, match="did you mean 'table1'"):
        find("tabel1")
    with pytest.raises(SpecError, match="did you mean 'small'"):
        reproduce("table1", "smal", [0], "*", Workshop(Path("unused"), Serial()))
    with pytest.raises(SpecError, match="No figure named 'ResNet-19 nasty'"):
        reproduce("table1", "smoke", [0], "ResNet-19 nasty", Workshop(Path("unused"), Serial()))
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
    assert rows["ResNet-18 normal"]["accuracies"][0] > 80
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
    rows = reproduce(name, "smoke", [0], "*", Workshop(hurried_folder, Serial()))
    assert len(rows) == len(cases)
    assert all(row.accuracies or row.measured[0].diverged for row in rows)


def test_what_is_measured_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((folder / "table1-smoke.json").read_text())["rows"]
    monkeypatch.setattr("undistill.fit._Loop.one_epoch", None)
    reproduce("table1", "smoke", [0, 1], "*", Workshop(folder, Serial()))
    assert json.loads((folder / "table1-smoke.json").read_text())["rows"] == before


def test_a_teacher_that_diverges_is_trained_once(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr("undistill.reproduce.case.train", lambda *asked, **_: trained.append(asked) or lost())
    teacher = Teacher(str(toy_file), "ConvNet(width=3)", Recipe())
    cases = [
        Case("normal", teacher),
        Case("nasty", teacher, "Nasty(omega=0.1)"),
        Case("no teacher", teacher, attack="Scratch()", student="ConvNet(width=2)", share=0.5),
    ]
    found = {case.name: one.diverged for case, one in Workshop(tmp_path, Serial()).measure(cases, 0)}
    assert found == {"normal": "NaN", "nasty": "NaN", "no teacher": "its teacher: NaN"}
    assert len(trained) == 1


def lost() -> None:
    raise NonFiniteLoss("NaN")


def test_another_adversary_is_trained_and_used(toy_file: Path, tmp_path: Path) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    same, other = (Teacher(str(toy_file), f"ConvNet(width={width})", recipe) for width in (3, 2))
    cases = [Case(name, same, "Nasty(omega=0.1)", adversary=a) for name, a in (("own", None), ("other", other))]
    found = {case.name: measured for case, measured in Workshop(tmp_path, Serial()).measure(cases, 0)}
    assert found["own"].divergence != found["other"].divergence
    assert len(list((tmp_path / "teachers").glob("convnet-*"))) == 2


def test_a_thief_with_fewer_images_asks_fewer_questions(toy_file: Path, tmp_path: Path) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    teacher = Teacher(str(toy_file), "ConvNet(width=3)", recipe)
    case = Case("", teacher, attack="HardLabels()", student="ConvNet(width=2)", recipe=recipe)
    queries = []
    for share in (1.0, 0.5):
        list(Workshop(tmp_path, Serial()).measure([Case(**(vars(case) | {"share": share}))], 0))
        queries.append({json.loads(file.read_text())["queries"] for file in (tmp_path / "cells").glob("*.json")})
    (all_images,) = queries[0]
    (fewer,) = queries[1] - queries[0]
    assert fewer == pytest.approx(all_images / 2, rel=0.1)


def test_a_row_shows_its_spread_and_what_diverged() -> None:
    case = Case("x", Teacher("Digits()", "ConvNet()", Recipe()), published=82.46)
    measured = {seed: Measured(80.0 + seed, 9.0 + seed) for seed in range(3)}
    assert Row(case, measured).cells() == ["x", "82.46", "81.0 ± 2.5", "3", "10.0"]
    assert Row(case, {0: Measured(80.0)}).cells() == ["x", "82.46", "80.0", "1", ""]
    assert Row(case, {0: Measured(80.0), 1: Measured(0.0, diverged="NaN")}).cells()[2] == "80.0, 1 diverged"
    assert Row(case, {0: Measured(0.0, diverged="NaN")}).cells()[2] == "1 diverged"


def test_a_narrower_call_keeps_what_the_table_holds(folder: Path) -> None:
    before = json.loads((folder / "table1-smoke.json").read_text())["rows"]
    rows = reproduce("table1", "smoke", [0], "ResNet-18 nasty", Workshop(folder, Serial()))
    assert [len(row.measured) for row in rows] == [2]
    assert json.loads((folder / "table1-smoke.json").read_text())["rows"] == before


def test_a_changed_case_costs_no_figure(toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another published figure or name is the same case; another recipe is another one, and the old figure is kept."""
    recipe = find("table1")("smoke")[0].teacher.recipe
    teacher = Teacher(str(toy_file), "ConvNet(width=3)", recipe)
    asked = [Case(name, replace(teacher, model=f"ConvNet(width={width})")) for name, width in (("a", 2), ("b", 3))]
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: asked)
    reproduce("toy", "smoke", [0, 1], "*", Workshop(tmp_path, Serial()))

    def known(part: str) -> dict[str, int]:
        rows = json.loads((tmp_path / "toy-smoke.json").read_text())[part]
        return {row["name"]: len(row["measured"]) for row in rows}

    asked[0] = replace(asked[0], name="A", published=99.0)
    reproduce("toy", "smoke", [2], "A", Workshop(tmp_path, Serial()))
    assert (known("rows"), known("earlier")) == ({"A": 3, "b": 2}, {})
    asked[1] = replace(asked[1], teacher=teacher, defence="Nasty(omega=0.1)")
    reproduce("toy", "smoke", [0], "b", Workshop(tmp_path, Serial()))
    assert (known("rows"), known("earlier")) == ({"A": 3, "b": 1}, {"b": 2})
    asked[1] = replace(asked[1], defence="")
    reproduce("toy", "smoke", [2], "b", Workshop(tmp_path, Serial()))
    assert (known("rows"), known("earlier")) == ({"A": 3, "b": 3}, {"b": 1})


def test_what_diverges_is_a_result_and_stops_nothing(toy_file: Path, tmp_path: Path) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    wild = recipe.model_copy(update={"lr": 1e30, "clip": 0.0})
    sane, mad = (Teacher(str(toy_file), "ConvNet(width=3)", how) for how in (recipe, wild))
    cases = [
        Case("bad student", sane, attack="SoftLabels()", student="ConvNet(width=2)", recipe=wild),
        Case("good student", sane, attack="SoftLabels()", student="ConvNet(width=2)", recipe=recipe),
        Case("bad teacher", mad),
    ]
    for _again in range(2):
        found = {case.name: one for case, one in Workshop(tmp_path, Serial()).measure(cases, 0)}
        assert [bool(one.diverged) for one in found.values()] == [True, False, True]
        assert found["good student"].accuracy > 30


def test_what_diverged_is_not_trained_again_by_the_same_code(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe.model_copy(update={"lr": 1e30, "clip": 0.0})
    case = Case("teacher", Teacher(str(toy_file), "ConvNet(width=3)", recipe))
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: [case])
    (before,) = reproduce("toy", "smoke", [0], "*", Workshop(tmp_path, Serial()))
    trained = []
    monkeypatch.setattr(Workshop, "honest", lambda *_: trained.append(1) or 1 / 0)
    (after,) = reproduce("toy", "smoke", [0], "*", Workshop(tmp_path, Serial()))
    assert before.measured[0].diverged
    assert (after.measured, trained) == (before.measured, [])
    monkeypatch.setattr("undistill.store.core_sha256", lambda: "another revision")
    with pytest.raises(ZeroDivisionError):
        reproduce("toy", "smoke", [0], "*", Workshop(tmp_path, Serial()))


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": null}', '{"rows": [3]}', '{"rows": [{"case": "x"}]}'])
def test_a_damaged_table_is_named_and_kept(content: str, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"command": "reproduce"}')
    table = tmp_path / "table1-smoke.json"
    table.write_text(content)
    with pytest.raises(StoreError, match=r"table1-smoke\.json is damaged .*remove it"):
        reproduce("table1", "smoke", [0], "*", Workshop(tmp_path, Serial()))
    assert table.read_text() == content


def test_a_folder_may_be_moved(toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    teacher, other = (Teacher(str(toy_file), f"ConvNet(width={width})", recipe) for width in (3, 2))
    case = Case("other", teacher, "Nasty(omega=0.1)", adversary=other)
    before = list(Workshop(tmp_path / "here", Serial()).measure([case], 0))
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr("undistill.fit._Loop.one_epoch", None)
    assert list(Workshop(tmp_path / "there", Serial()).measure([case], 0)) == before


def test_what_was_measured_by_other_code_says_so(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find("table1")("smoke")[0].teacher.recipe
    case = Case("teacher", Teacher(str(toy_file), "ConvNet(width=3)", recipe))
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda scale: [case])
    (before,) = reproduce("toy", "smoke", [0], "*", Workshop(tmp_path, Serial()))
    monkeypatch.setattr("undistill.store.core_sha256", lambda: "another revision")
    (after,) = reproduce("toy", "smoke", [0], "*", Workshop(tmp_path, Serial()))
    assert after.measured == before.measured, "the network is that of the first revision, and so is its stamp"


def test_the_authors_mistake_is_made_in_every_training() -> None:
    for case in map(selected_on_test, find("adversary")("smoke")):
        assert case.recipe.selection == "best"
        for teacher in filter(None, (case.teacher, case.adversary)):
            assert teacher.data == "Leaky(of='Digits()')"
            assert teacher.recipe.selection == "best"


def test_thieves_without_data_are_measured_on_digits(tmp_path: Path) -> None:
    rows = reproduce("data-free", "smoke", [0], "*", Workshop(tmp_path, Serial()))
    measured = {row.case.name: row.measured[0] for row in rows}
    attacks = " -> DAFL", " -> Fast", " -> DeepInversion"
    names = {f"digits: {side}{attack}" for side in ("normal", "nasty") for attack in ("", *attacks)}
    assert set(measured) == names
    assert measured["digits: normal"].accuracy > 80
    for name, one in measured.items():
        assert bool(one.sheet) == ("->" in name)
        if "normal -> " in name:
            assert one.accuracy > 15, "above chance, of 10 classes"
        if one.sheet:
            assert (tmp_path / one.sheet).stat().st_size > 0, "a sheet of images for each student"
