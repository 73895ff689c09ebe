"""Cells whose students are trained in the same steps are those of students alone."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RECIPE, STUDENT, TEACHER
from tests.test_contracts import ATTACKS
from tests.test_stack import close
from undistill.attacks import Attack
from undistill.auditing.cell import Job, Outcome
from undistill.auditing.launchers import Launcher, Pool, Serial
from undistill.auditing.pair import VictimPair
from undistill.auditing.schema import Cell
from undistill.auditing.together import grouped
from undistill.core.errors import SpecError
from undistill.core.progress import Progress
from undistill.models import Model
from undistill.runs.run import Run
from undistill.training.loop import Loop


def jobs(victim: Run, attacks: list[Attack], seeds: tuple[int, ...] = (0, 1), pool: str = "") -> list[Job]:
    """Of two epochs: what is rounded otherwise grows with every step."""
    pair, recipe = VictimPair.of(victim, None, seeds, None, pool=pool), RECIPE.model_copy(update={"epochs": 2})
    student = Model.parse(STUDENT)
    return [Job(pair, "victim", attack, student, seed, recipe) for attack in attacks for seed in seeds]


@pytest.fixture
def students_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Outcome]]:
    """Outcomes of some jobs by the names of the jobs."""

    def run(launcher: Launcher, wanted: list[Job], cells: Path) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        result = Job._result

        def kept(job: Job, outcome: Outcome) -> Any:
            outcomes[job.name] = outcome
            return result(job, outcome)

        with monkeypatch.context() as patch:
            patch.setattr(Job, "_result", kept)
            launcher.run(wanted, cells, Progress.silent())
        return outcomes

    return run


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_every_attack_may_be_stacked(attack: Attack, victim: Run, pool: str, tmp_path: Path, students_of) -> None:
    """With two seeds: the same students up to rounding and the same queries, whether or not it can be."""
    wanted = jobs(victim, [attack], pool=pool)
    alone = students_of(Serial(), wanted, tmp_path / "alone" / "cells")
    stacked = students_of(Serial(stacked=4), wanted, tmp_path / "stacked" / "cells")
    for name, one in alone.items():
        assert (one.student is None) == (stacked[name].student is None)
        if one.student and stacked[name].student:
            assert close(one.student, stacked[name].student)
        assert one.oracle.ledger.billed == stacked[name].oracle.ledger.billed
        assert one.oracle.ledger.distinct == stacked[name].oracle.ledger.distinct
        assert len(one.fit.history) == len(stacked[name].fit.history)
    assert not list((tmp_path / "stacked" / "cells").glob("*/")), "finished cells leave no folder behind"


def test_most_attacks_are_stacked(victim: Run, pool: str, tmp_path: Path, students_of) -> None:
    """Attacks that are one loss, and each student of a chain."""
    names = "Scratch", "LabelSmoothing", "HardLabels", "SoftLabels", "DKD", "DIST", "LSKD", "AffineMap", "MKD", "Chain"
    attacks = [attack for attack in ATTACKS if type(attack).__name__ in names]
    assert len(attacks) == len(names)
    stacked = students_of(Serial(stacked=32), jobs(victim, attacks), tmp_path / "cells")
    for name, outcome in stacked.items():
        assert all(" in a stack of " in said for said in outcome.fit.computed), name


def test_whoever_cannot_be_stacked_holds_nobody_up(
    victim: Run, tmp_path: Path, students_of, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    attacks = [Attack.parse("PBayes(draws=2, rounds=1)"), Attack.parse("SoftLabels()")]
    stacked = students_of(Serial(stacked=8), jobs(victim, attacks), tmp_path / "cells")
    assert "PBayes on victim, seed 0: trained alone. The training draws random numbers in its steps." in caplog.text
    said = {name: outcome.fit.computed[-1] for name, outcome in stacked.items()}
    assert "in a stack" in said["SoftLabels on victim, seed 0"]
    assert "in a stack" not in said["PBayes on victim, seed 0"]


def test_a_student_whose_checkpoint_is_not_kept_is_trained_alone(
    victim: Run, tmp_path: Path, students_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for a stack again and again."""
    save = Loop.save
    monkeypatch.setattr(Loop, "save", lambda self: None if self.fit.suspends else save(self))
    found = students_of(Serial(stacked=2), jobs(victim, [Attack.parse("SoftLabels()")]), tmp_path / "cells")
    assert all("in a stack" not in one.fit.computed[0] for one in found.values())


MINE = """
from pydantic import PrivateAttr

from undistill import Access, Attack


class Greedy(Attack):
    needs = Access.QUERY
    _scale: float = PrivateAttr(0.0)

    def run(self, oracle, fresh, data, fit):
        self._scale = 1.0 + fit.seed % 7

        def objective(network, batch):
            return {"match": self._scale * (network(batch.images) - oracle(batch).log_p).square().mean()}

        try:
            return fit(fresh(), data, objective)
        except Exception:
            return fresh(1)
"""


def test_what_an_attack_of_the_users_own_keeps_or_catches_is_its_own(victim: Run, tmp_path: Path, students_of) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    wanted = jobs(victim, [Attack.from_user(f"{tmp_path / 'mine.py'}:Greedy()")])
    alone = students_of(Serial(), wanted, tmp_path / "a" / "cells")
    stacked = students_of(Serial(stacked=2), wanted, tmp_path / "b" / "cells")
    for name, one in alone.items():
        assert "in a stack of 2" in stacked[name].fit.computed[0]
        assert one.student
        assert stacked[name].student
        assert close(one.student, stacked[name].student, 1e-2)


def test_a_pool_stacks_too_and_keeps_every_worker_busy(victim: Run, tmp_path: Path) -> None:
    wanted = jobs(victim, [Attack.parse("SoftLabels()"), Attack.parse("HardLabels()")])
    assert [len(group) for group in Pool(workers=2, stacked=8)._groups(wanted, 2).values()] == [2, 2]
    found: list[Cell] = Pool(workers=2, threads=1, stacked=8).run(wanted, tmp_path / "cells", Progress.silent())
    for job, cell in zip(wanted, found, strict=True):
        assert (cell.attack, cell.seed) == (str(job.attack), job.seed)
        assert cell.compute.endswith(" in a stack of 2")


def test_jobs_are_grouped_by_student_and_by_as_many_as_asked(victim: Run) -> None:
    wanted = jobs(victim, [Attack.parse("SoftLabels()"), Attack.parse("HardLabels()")], seeds=(0, 1, 2))
    other = replace(wanted[0], student=Model.parse(TEACHER))
    groups = grouped([wanted[0], other, *wanted, wanted[0]], 4)
    assert [len(group) for group in groups] == [4, 2, 1]
    assert [job for group in groups for job in group] == [*wanted, other]


@pytest.mark.parametrize(("alone", "together", "pays"), [(1.0, 0.5, True), (1.0, 0.95, False)])
def test_auto_stacks_where_a_trial_says_that_it_pays(
    victim: Run,
    tmp_path: Path,
    students_of,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    alone: float,
    together: float,
    pays: bool,
) -> None:
    """Students are the same either way, up to rounding; the trial leaves them as they were."""
    caplog.set_level(logging.INFO)

    def timed(step: Callable[[], None]) -> float:
        step()
        return {"alone": alone, "together": together}[step.__name__]

    monkeypatch.setattr("undistill.training.stack._timed", timed)
    wanted = jobs(victim, [Attack.parse("SoftLabels()")])
    launcher = Launcher.parse("Serial(stacked='auto')")
    found = students_of(launcher, wanted, tmp_path / "a" / "cells")
    assert all(("in a stack of 2" in one.fit.computed[0]) == pays for one in found.values())
    assert ("takes 950.0 ms stacked and 1000.0 ms alone" in caplog.text) == (not pays)
    expected = students_of(Serial(), wanted, tmp_path / "b" / "cells")
    for name, one in expected.items():
        assert one.student
        assert found[name].student
        assert close(one.student, found[name].student, 1e-2)


@pytest.mark.parametrize(("gpus", "better"), [(1, "Serial(stacked=16)"), (2, "Pool(workers=2, stacked=16)")])
def test_more_workers_than_gpus_are_told_what_is_better(
    gpus: int, better: str, caplog: pytest.LogCaptureFixture
) -> None:
    Pool(workers=gpus)._say_what_is_better(gpus)
    assert not caplog.text
    Pool(workers=4)._say_what_is_better(gpus)
    assert f"4 workers share {gpus} GPU" in caplog.text
    assert better in caplog.text
    Launcher.from_user(better)


@pytest.mark.parametrize("wrong", ["0", "5000", "2.5", "'yes'"])
def test_a_wrong_number_of_students_is_explained(wrong: str) -> None:
    with pytest.raises(SpecError, match=r"stacked = .* a number of students from 1 to 4096, or 'auto'"):
        Launcher.from_user(f"Serial(stacked={wrong})")
