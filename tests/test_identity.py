"""Keys hold what changes a result and nothing else; and what earlier versions wrote is still understood."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import FAST, RECIPE, TEACHER
from undistill import core, training
from undistill.api import train
from undistill.attacks import Attack
from undistill.cli import app
from undistill.cli.demo import DEFENCE, REQUEST
from undistill.core.code import code_sha256, trust
from undistill.core.errors import StoreError
from undistill.core.identity import ROOT, program_sha256, source_sha256
from undistill.report.page import read_report, render
from undistill.report.table import Row
from undistill.runs.folder import claim
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.training.recipe import Recipe

PROGRAM = '''"""A module."""
import helper

def make(width):
    """Make it."""
    if width < 1:
        raise ValueError(f"too small: {width}")
    return helper.double(width)
'''
HELPER = "def double(width):\n    return 2 * width\n"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "other.py").write_text("x = 1\n")
    (tmp_path / "net.py").write_text(PROGRAM)
    return tmp_path / "net.py"


SAME = {
    "a comment": PROGRAM + "# why\n",
    "a docstring": PROGRAM.replace("Make it.", "Makes it, in one go."),
    "layout": PROGRAM.replace("    return helper", "\n    return  helper"),
    "an error's words": PROGRAM.replace("too small", "must be larger"),
}
OTHER = {
    "a number": PROGRAM.replace("< 1", "< 2"),
    "a name": PROGRAM.replace("helper.double", "helper.twice"),
    "a default": PROGRAM.replace("(width):", "(width=3):", 1),
}


@pytest.mark.parametrize("change", SAME)
def test_what_changes_no_result_is_in_no_key(change: str, program: Path) -> None:
    before = program_sha256(program)
    program.write_text(SAME[change])
    assert program_sha256(program) == before


@pytest.mark.parametrize("change", OTHER)
def test_what_changes_a_result_is_in_the_key(change: str, program: Path) -> None:
    before = program_sha256(program)
    program.write_text(OTHER[change])
    assert program_sha256(program) != before


def test_a_module_that_is_imported_is_in_the_key_and_another_is_not(program: Path) -> None:
    before = program_sha256(program)
    (program.parent / "other.py").write_text("x = 2\n")
    assert program_sha256(program) == before
    (program.parent / "helper.py").write_text(HELPER.replace("2 *", "3 *"))
    changed = program_sha256(program)
    assert changed != before
    (program.parent / "helper.py").write_text("import other\n" + HELPER.replace("2 *", "3 *"))
    followed = program_sha256(program)
    (program.parent / "other.py").write_text("x = 3\n")
    assert len({changed, followed, program_sha256(program)}) == 3, "through others as well"


def test_relative_imports_of_the_users_package_are_followed(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text("from . import layers\nfrom .sub import other\nfrom torch import nn\n")
    (package / "layers.py").write_text("width = 1\n")
    before = program_sha256(package / "net.py")
    (package / "layers.py").write_text("width = 2\n")
    assert program_sha256(package / "net.py") != before


def test_a_moved_folder_has_the_same_key(program: Path) -> None:
    before = program_sha256(program)
    moved = shutil.copytree(program.parent, program.parent / "moved")
    assert program_sha256(moved / "net.py") == before


def test_an_installed_package_has_the_same_keys_as_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries beside it are not read, which were followed once to the bottom of torch."""
    fit = Path("undistill/training/fit.py")
    here = program_sha256(ROOT / fit)
    shutil.copytree(ROOT / "undistill", tmp_path / "undistill", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "torch.py").write_text("import numpy\n")
    monkeypatch.setattr("undistill.core.identity.ROOT", tmp_path)
    monkeypatch.setattr("undistill.core.identity.PACKAGE", tmp_path / "undistill")
    speaking = {tmp_path / "undistill" / "core" / name for name in ("errors.py", "progress.py")}
    monkeypatch.setattr("undistill.core.identity.SPEAKING", speaking)
    assert program_sha256(tmp_path / fit) == here


def test_a_users_file_beside_this_package_does_not_follow_it(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program.write_text("import undistill\n" + PROGRAM)
    alone = program_sha256(program)
    (program.parent / "undistill").mkdir()
    (program.parent / "undistill" / "__init__.py").touch()
    monkeypatch.setattr("undistill.core.identity.PACKAGE", program.parent / "undistill")
    assert program_sha256(program) == alone


def test_a_sum_of_hundreds_of_terms_is_no_special_case(program: Path) -> None:
    """It is nested as deeply as it has terms: its key holds neither comments nor the depth of who asks."""
    terms = "x = " + " + ".join(["1"] * 600) + "\n"
    program.write_text(terms + PROGRAM)
    key = program_sha256(program)
    program.write_text("# a comment\n" + terms + PROGRAM)
    assert _deeper(100, lambda: program_sha256(program)) == key
    (program.parent / "helper.py").write_text(HELPER.replace("2 *", "3 *"))
    assert program_sha256(program) != key


def _deeper(frames: int, call: Callable[[], str]) -> str:
    return _deeper(frames - 1, call) if frames else call()


def test_our_own_keys_hold_the_loop_and_not_the_report() -> None:
    names = {str(file.relative_to(ROOT)) for file in closure(Path(training.__file__).with_name("fit.py"))}
    assert {"undistill/training/loop.py", "undistill/data/views.py", "undistill/core/seeds.py"} <= names
    assert not any(name.startswith(("undistill/report", "undistill/cli", "undistill/papers")) for name in names)
    assert not {"undistill/core/errors.py", "undistill/core/progress.py"} & names
    kinds = [type(Attack.parse(name)) for name in ("SoftLabels()", "HardLabels()", "DAFL()")]
    assert len({source_sha256(kind) for kind in kinds}) == 3


def closure(file: Path) -> set[Path]:
    """The modules in the key of `file`, found anew."""
    from undistill.core import identity

    found, todo = {file}, [file]
    while todo:
        new = {one for one in identity._imports(todo.pop(), (ROOT,)) if one not in found | identity.SPEAKING}
        found |= new
        todo += new
    return found


def test_the_text_of_a_reference_is_hashed_only_where_it_is_trusted(program: Path) -> None:
    trust(f"{program}:make")
    assert code_sha256(f"{program}:make(width=3)") == program_sha256(program)
    assert Path(core.__file__).exists()


# What earlier versions wrote


def test_a_run_of_an_earlier_version_opens(victim: Run, honest: Run, tmp_path: Path) -> None:
    """Its recipe had an engine, and it knew one defence."""
    old = shutil.copytree(victim.folder, tmp_path / "old")
    for name in ("run.json", "request.json"):
        record = json.loads((old / name).read_text())
        record["defence"] = record.pop("defences")[0]
        record["settings"]["recipe"]["engine"] = record["settings"]["recipe"].pop("compute")
        record.pop("responses", None)
        (old / name).write_text(json.dumps(record))
    run = Run.open(old)
    assert run.record["defences"] == victim.record["defences"]
    assert run.network().state_dict().keys() == victim.network().state_dict().keys()


def test_a_command_of_an_earlier_version_is_instant(toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes))\n"
    )
    settings = TrainSettings(recipe=RECIPE)
    words = str(toy_file), f"{tmp_path / 'net.py'}:make", tmp_path / "run"
    run = train(*words, settings=settings, device="cpu")
    from undistill.core.files import sha256

    for name in ("run.json", "request.json"):
        record = json.loads((run.folder / name).read_text())
        record["refers"] = dict.fromkeys(record["refers"], sha256(tmp_path / "net.py"))
        record["settings"]["recipe"]["engine"] = record["settings"]["recipe"].pop("compute")
        (run.folder / name).write_text(json.dumps(record))
    monkeypatch.setattr("undistill.training.loop.Loop.one_round", None)
    again = train(*words, settings=settings, device="cpu")
    assert again.digest == run.digest
    again.network(again.model())
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text().replace("Flatten()", "Flatten(1)"))
    with pytest.raises(StoreError, match="holds another run"):
        train(*words, settings=settings, device="cpu")


def test_a_report_of_format_1_opens(victim: Run, tmp_path: Path) -> None:
    from undistill.api import audit

    audit(victim, tmp_path / "a", students=["ConvNet(width=2)"], seeds=1, device="cpu")
    new = read_report(tmp_path / "a")
    report = json.loads((tmp_path / "a" / "report.json").read_text()) | {"format": 1}
    verdict = report["verdict"]
    verdict["poison"], verdict["control"] = verdict.pop("kd_gain"), verdict.pop("kd_gain_honest")
    for cell in report["cells"]:
        cell["engine"] = cell.pop("compute")
        cell["floor"] = cell.pop("role") in ("no teacher", "labels", "top answers")
        for name in ("distinct", "budget", "evaluation"):
            cell.pop(name)
    (tmp_path / "a" / "report.json").write_text(json.dumps(report))
    old = read_report(tmp_path / "a")
    assert old.verdict == new.verdict
    assert [cell.role for cell in old.cells] == [cell.role for cell in new.cells]
    assert render(tmp_path / "a").exists()


def test_a_row_of_an_earlier_table_is_recognised() -> None:
    assert Row(name="x", measured={}, case="Recipe(engine=Engine(compile=False))").case == (
        "Recipe(compute=Compute(compile=False))"
    )
    assert Recipe(engine={"precision": "bf16"}).compute.precision == "bf16"  # type: ignore[arg-type]


def test_old_option_names_say_the_new_ones(toy_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def call(*words: object) -> None:
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 0, result.stderr

    with caplog.at_level(logging.WARNING):
        settings = [f"--set={setting}" for setting in FAST]
        words = ["train", "--data", toy_file, "--model", TEACHER, "--out", tmp_path / "a", *settings]
        call(*words, "--set", "recipe.engine.layout=channels_last")
        assert "recipe.engine is now called recipe.compute" in caplog.text
        call("reproduce", "list", "--as-authors")
    assert "--as-authors is now called --select-on-test" in caplog.text
    assert Run.open(tmp_path / "a").record["settings"]["recipe"]["compute"]["layout"] == "channels_last"


def test_a_demo_is_taken_up_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    earlier = {name: value for name, value in REQUEST.items() if name != "defences"} | {"defence": DEFENCE}
    (tmp_path / "old" / "request.json").write_text(json.dumps(earlier))
    with claim(tmp_path / "old", REQUEST):
        pass
    for _ in range(2):
        with claim(tmp_path / "new", REQUEST):
            pass
