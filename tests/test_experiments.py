"""Experiments of the paper: what they are made of, vary, say and expect; none of it is trained here."""

import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

from undistill.data import Digits, Leaky
from undistill.data.views import Views
from undistill.papers.case import Case
from undistill.papers.reproduce import EXPERIMENTS, about, find, recall, row_of, selected_on_test
from undistill.papers.scales import SCALES, Scale, setting

EXISTING = [
    (name, scale)
    for name in EXPERIMENTS
    for scale in SCALES
    if not (scale in ("gpu", "paper") and name == "fashion") and not (scale == "small" and name == "table3")
]


@pytest.mark.parametrize(("name", "scale"), EXISTING)
def test_every_experiment_is_made_of_what_there_is(name: str, scale: Scale) -> None:
    cases = find(name)(scale)
    names = [case.name for case in cases]
    assert all(sum(fnmatch(other, name) for other in names) == 1 for name in names), "a name selects its own row"
    assert all(bool(case.attack) == bool(case.student) for case in cases)
    for case in cases:
        assert type(case.teacher.data).parse(str(case.teacher.data)) == case.teacher.data


RESULTS = Path(__file__).parent.parent / "docs" / "results"


@pytest.mark.parametrize("table", sorted(RESULTS.glob("*.json")), ids=lambda table: table.stem)
def test_published_results_are_of_experiments_as_they_are(table: Path) -> None:
    """A setting that is changed must be measured anew, or its old figures leave the documents."""
    name, scale = table.stem.rsplit("-", 1)
    rows = [row_of(case) for case in find(name)(scale)]
    earlier = recall(table.with_suffix(""), rows)
    assert any(row.measured for row in rows)
    assert earlier == []


ABLATED: dict[str, Callable[[Case], object]] = {
    "omega": lambda case: f"omega={case.defence.omega:g}",
    "published-omegas": lambda case: f"omega={case.defence.omega:g}",
    "adversary-temperature": lambda case: f"T_A={case.defence.T:g}",
    "adversary": lambda case: f"adversary={(case.adversary or case.teacher).model}",
    "temperature": lambda case: f"T={case.attack.T:g}",
    "alpha": lambda case: f"alpha={case.attack.alpha:g}",
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


@pytest.mark.parametrize("scale", ["small", "gpu", "paper"])
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


@pytest.mark.parametrize("data", ["CIFAR-10", "CIFAR-100", "Tiny-ImageNet"])
def test_gpu_is_paper_with_one_teacher_and_a_short_schedule(data: str) -> None:
    paper, gpu = setting(data, "paper"), setting(data, "gpu")
    assert (gpu.data, gpu.omega, gpu.T, gpu.alpha, gpu.twins) == (paper.data, paper.omega, paper.T, 0.9, paper.twins)
    assert {name: student.model for name, student in gpu.students.items()} == {
        name: student.model for name, student in paper.students.items()
    }
    assert list(gpu.teachers) == ["ResNet-18"]
    for recipe in (gpu.recipe, *(student.recipe for student in gpu.students.values())):
        assert (recipe.epochs, recipe.schedule, recipe.selection) == (30, "one_cycle", "best")
        assert recipe.views == paper.recipe.views


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
        network = model.build((3, 32, 32), 10, 0)
        sizes.append(sum(weights.numel() for weights in network.parameters()))
    assert sizes == sorted(set(sizes))


def test_the_authors_mistake_is_made_in_every_training() -> None:
    for case in map(selected_on_test, find("adversary")("smoke")):
        assert case.recipe.selection == "best"
        for teacher in filter(None, (case.teacher, case.adversary)):
            assert teacher.data == Leaky(of=str(Digits()))
            assert teacher.recipe.selection == "best"
