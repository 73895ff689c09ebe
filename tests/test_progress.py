"""Tests of progress and plans: how long work takes, and which work a command is about to do."""

import io
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.conftest import FAST, RECIPE, STUDENT, TEACHER
from undistill.api import audits
from undistill.auditing.forecast import Forecast, describe, forecast, seconds_of
from undistill.cli import app
from undistill.core import progress as module
from undistill.core.progress import Progress, duration
from undistill.data import Data
from undistill.models import Model
from undistill.runs.run import Run
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(width: int = 200) -> tuple[Progress, io.StringIO]:
    written = io.StringIO()
    return Progress(Console(file=written, width=width, soft_wrap=True)), written


def test_how_long_it_takes_counts_the_part_that_is_under_way(clock: Clock) -> None:
    progress, written = lines()
    with progress.task("audit", 5, done=1) as whole:
        clock.now = 100
        whole.advance()  # 100 s for one of four
        with progress.task("student", 10) as part:
            clock.now = 150
            part.reach(5, "loss 1")  # 150 s for one and a half: 2.5 are left
    assert written.getvalue().splitlines() == [
        "audit: 2/5 about 5 min left",
        "student: 5/10 loss 1 · audit: about 4 min left",
    ]


def test_a_stack_makes_up_as_many_steps_of_the_audit_as_it_has_students(clock: Clock) -> None:
    progress, written = lines()
    with progress.task("audit", 8), progress.task("4 students", 10, units=4) as part:
        clock.now = 100
        part.reach(5, "")  # 100 s for half of four of eight: 300 are left
    assert written.getvalue().splitlines() == ["4 students: 5/10 audit: about 5 min left"]


def test_nothing_is_said_of_what_nobody_knows(clock: Clock) -> None:
    progress, written = lines()
    with progress.task("audit", 1) as whole:
        clock.now = 50
        with progress.task("student", 2, done=1) as part:
            part.reach(1, "as before")
            part.reach(2, "")
        whole.advance()
    assert written.getvalue().splitlines() == ["student: 2/2", "audit: 1/1"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.1, "about 5 s"),
        (38, "about 40 s"),
        (240, "about 4 min"),
        (7900, "about 2 h 10 min"),
        (300_000, "about 3 days"),
    ],
)
def test_durations_in_words(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_notebooks_show_progress_and_scripts_do_if_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(asked: bool | None) -> str:
        with Progress.of(asked) as progress:
            progress.say("begins")
        return capsys.readouterr().err

    assert [said(None), said(False), said(True)] == ["", "", "begins\n"]
    shell = type("ZMQInteractiveShell", (), {})()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert [said(None), said(False)] == ["begins\n", ""]


def test_a_plan_counts_what_is_left(victim: Run, tmp_path: Path) -> None:
    plan = audits.plan_audit(victim, students=[STUDENT], seeds=2, device="cpu")
    assert describe(plan, tmp_path) == (
        "Plan: 20 students to train, each for 6 epochs of 5 batches: 6 attacks (Scratch, LabelSmoothing, HardLabels, "
        "SoftLabels) x 1 network x 2 seeds, on the protected model and on its unprotected twin. Before, each thief "
        "tries 1 setting for 33% of the epochs."
    )
    (tmp_path / f"{plan.jobs[0].key}.json").write_text("{}")
    assert "Plan: 19 students to train (1 of 20 are there)" in describe(plan, tmp_path)
    whole, one = forecast(plan, tmp_path), forecast(replace(plan, jobs=plan.jobs[:2]), tmp_path)
    assert whole.seconds > one.seconds > 0
    curved = replace(plan, curve=True)  # one budget, all images: a thief on two sides and two floors, two seeds
    assert describe(curved, tmp_path).endswith("33% of the epochs. The curve takes 8 more students.")
    assert forecast(curved, tmp_path).seconds > whole.seconds
    assert not list((victim.folder / "answers").glob("*/forecast*"))


def test_a_trial_is_scaled_to_the_whole_training(toy: Data) -> None:
    asked = []

    def train(data: Data, fit: Fit) -> None:
        asked.append((len(data.train), fit.recipe.epochs))
        fit(
            Model.parse(TEACHER).build(data.shape, 3, 0),
            data,
            lambda n, b: {"ce": cross_entropy(n(b.images), b.labels)},
        )
        fit.history[-1]["seconds"] = 2.0

    recipe = RECIPE.model_copy(update={"batch_size": 4})
    assert seconds_of(train, toy.split, recipe, torch.device("cpu")) == 2.0 * 6 * len(toy.train) / 16
    assert asked == [(16, 2)]


def test_attacks_without_data_are_not_tried() -> None:
    said = str(Forecast(seconds=100, untried={"DAFL", "Fast"}))
    assert said == "That takes about 2 min on this machine, one after another, without DAFL, Fast; by a trial of each."


def test_dry_runs_change_nothing(victim: Run, tmp_path: Path) -> None:
    before = sorted(path for path in victim.folder.parent.rglob("*"))
    words = ["audit", str(victim.folder), "--student", STUDENT, "--out", str(tmp_path / "audit"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--dry-run", *(word for pair in FAST for word in ("--set", pair))])
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 2), done.stderr
    assert "Plan: 30 students to train" in done.stdout
    assert "That takes about" in done.stdout
    assert not (tmp_path / "audit").exists()
    assert before == sorted(path for path in victim.folder.parent.rglob("*"))


def test_a_table_is_planned(tmp_path: Path) -> None:
    words = [
        "reproduce",
        "table1",
        "--scale",
        "smoke",
        "--cells",
        "*CNN",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "Plan:" in done.stdout
    assert "That takes about" in done.stdout
    assert not list(tmp_path.iterdir())
