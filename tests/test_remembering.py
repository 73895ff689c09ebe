"""Students, defences and audits are the same bits, whether answers are remembered or asked again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import NASTY, RECIPE, STUDENT, students
from undistill.api import audit
from undistill.attacks import Attack
from undistill.data import Data
from undistill.defences import Defence
from undistill.models import Model
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.training.answers import AnswerStore, RememberedAnswers
from undistill.training.fit import Fit
from undistill.victims.oracle import Oracle
from undistill.victims.victim import NetworkVictim


@pytest.fixture
def victim() -> nn.Module:
    return Model.parse("ConvNet(width=4)").build((1, 12, 12), 3, seed=1).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("attack", ["SoftLabels", "HardLabels"])
def test_students_are_the_same_bits_with_and_without(attack: str, victim: nn.Module, toy: Data, tmp_path: Path) -> None:
    """And the attack is charged the same."""

    def student(store: AnswerStore) -> tuple[nn.Module, int]:
        parsed = Attack.parse(attack)
        oracle = Oracle(NetworkVictim(RememberedAnswers(victim, store=store)), parsed.needs)
        fit = Fit(RECIPE, 3, torch.device("cpu"))
        return parsed.run(oracle, students(toy, seed=5), toy.split, fit), oracle.ledger.billed

    asked, charged = student(AnswerStore(limit=0))
    for _ in range(2):
        remembered, also_charged = student(AnswerStore(tmp_path))
        assert same(asked, remembered)
        assert charged == also_charged == RECIPE.epochs * len(toy.train)


def test_a_second_defence_asks_the_adversary_nothing(honest: Run, toy: Data, tmp_path: Path, monkeypatch) -> None:
    asked = []
    compute = RememberedAnswers._run
    monkeypatch.setattr(RememberedAnswers, "_run", lambda *words: asked.append(words) or compute(*words))

    def nasty(omega: float, store: AnswerStore) -> nn.Module:
        fit = Fit(RECIPE, 3, torch.device("cpu"), store=store)
        teacher = honest.network()
        defence = Defence.parse(f"Nasty(omega={omega})")
        return defence.protect(teacher, teacher, lambda: honest.fresh(1), toy.split, fit)

    plain = nasty(0.1, AnswerStore(limit=0))
    nasty(0.05, AnswerStore(tmp_path))
    asked.clear()
    assert same(nasty(0.1, AnswerStore(tmp_path)), plain)
    assert not asked


def test_an_audit_is_the_same_with_and_without(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    victim = protect(honest, NASTY, tmp_path / "victim", settings=Settings(recipe=RECIPE), device="cpu", remember=0)

    def cells(out: str, remember: float) -> list[dict[str, object]]:
        report = audit(victim, tmp_path / out, students=[STUDENT], seeds=1, device="cpu", remember=remember)
        return [cell.model_dump(exclude={"seconds"}) for cell in report.cells]

    assert cells("plain", 0) == cells("remembered", 1)
    assert list((victim.folder / "answers").glob("*/*.safetensors"))
