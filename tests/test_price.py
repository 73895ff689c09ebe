"""A price instead of omega: the weight that is found, what is believed to be lost, and what it may cost."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import RECIPE
from undistill.api import protect
from undistill.core.errors import ModelError, SpecError, Unsuitable
from undistill.data import Data
from undistill.defences import Defence
from undistill.defences.nasty import Nasty, calibrated
from undistill.defences.price import Attempt, at_price, believed, cost
from undistill.report.evidence import read_curve
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.training.fit import Fit
from undistill.training.loop import Loop
from undistill.training.metrics import accuracy, ece, evaluate

CPU = torch.device("cpu")


def attempt(weight: float, lost: float, error: float) -> Attempt:
    return Attempt(nn.Identity(), weight, lost, error, [])


def test_what_is_believed_lies_between_measurement_and_experience() -> None:
    few, many = attempt(0.06, lost=1.0, error=40.0), attempt(0.06, lost=1.0, error=0.01)
    assert few.strength == pytest.approx(4)
    assert believed(few, [few]) == pytest.approx(4, rel=0.01), "experience: one point at 0.03, by the square"
    assert believed(many, [many]) == pytest.approx(1, rel=0.01), "the measurement"
    both = attempt(0.03, lost=3.0, error=1.0)  # as exact as experience
    assert cost([both]) == pytest.approx(2)
    assert believed(attempt(0.06, lost=0.0, error=10.0), [both]) == pytest.approx(8), "of another attempt, too"
    assert cost([both, both]) == pytest.approx(2), "the same images once more are no new evidence"
    ruined = attempt(0.02, lost=30.0, error=7.0)
    assert believed(ruined, [ruined]) == pytest.approx(16), "at least what was surely lost"


def found(price: float, lost: Callable[[float], float], error: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The weights that are tried where each loses `lost(weight)` points, and at the end the one that is kept."""
    tried: list[float] = []

    class Named(nn.Linear):
        pass

    def train(weight: float) -> nn.Module:
        tried.append(weight)
        return Named(1, 1)

    class Nothing:
        class validation:
            labels = torch.zeros(1)

    monkeypatch.setattr("undistill.defences.price.evaluate", lambda network, samples: torch.zeros(1))
    monkeypatch.setattr("undistill.defences.price.accuracy_lost", lambda *_: (lost(tried[-1]) / 100, error / 100))
    fit = Fit(RECIPE, 0, CPU)
    at_price(price, nn.Identity(), Nothing, fit, train)  # type: ignore[arg-type]
    return [*tried, fit.found["omega"]]


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 8.0])
def test_exact_measurements_find_the_price(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets on which the same weight costs 400 times as much as on others."""
    *tried, chosen = found(1.0, lambda weight: scale * (weight / 0.03) ** 2, 0.01, monkeypatch)
    assert len(tried) <= 3
    assert scale * (chosen / 0.03) ** 2 == pytest.approx(1.0, rel=0.25) or (scale < 0.1 and chosen == max(tried))


def test_where_nothing_is_lost_the_strongest_is_kept_and_what_is_ruined_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    *tried, chosen = found(0.5, lambda weight: -0.8, 0.5, monkeypatch)
    assert tried == sorted(tried)
    assert chosen == tried[-1]
    *tried, chosen = found(0.5, lambda weight: 40.0 if weight > 0.2 else -0.8, 0.5, monkeypatch)
    assert chosen < 0.2 < max(tried)
    with pytest.raises(ModelError, match=r"Training on costs 30.0 points .* and the price is 0.5. Lower recipe.lr"):
        found(0.5, lambda weight: 30.0, 1.0, monkeypatch)


def test_few_images_leave_it_to_experience(monkeypatch: pytest.MonkeyPatch) -> None:
    *tried, chosen = found(1.0, lambda weight: 0.0, 50.0, monkeypatch)
    assert tried == [0.03]
    assert chosen == 0.03


@pytest.mark.parametrize("price", [1.0, 3.0])
def test_a_price_takes_no_longer_than_one_and_a_half_trainings(
    price: float, toy: Data, honest: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, teacher, rounds = Fit(RECIPE, 0, CPU), honest.network(), [0]
    plain = Loop.one_round

    def counted(loop: Loop) -> dict[str, float]:
        rounds[0] += 1
        return plain(loop)

    monkeypatch.setattr(Loop, "one_round", counted)
    network = Nasty(price=price).protect(teacher, teacher, lambda: honest.fresh(1), toy.split, fit)
    assert rounds[0] <= math.ceil(1.5 * RECIPE.epochs) + 2
    assert len(fit.history) == RECIPE.epochs / 2, "the record is that of the training that was kept"
    assert fit.seconds > sum(epoch["seconds"] for epoch in fit.history) or rounds[0] == len(fit.history)
    assert set(fit.found) == {"omega"}
    assert accuracy(evaluate(network, toy.test), toy.test.labels) > 1 - price / 100 - 0.1


def test_a_run_at_a_price_says_what_was_found_and_repeats(honest: Run, tmp_path: Path) -> None:
    runs = [
        protect(
            honest,
            ["Nasty(price=2)", "Sealed(levels=2)"],
            tmp_path / name,
            settings=Settings(recipe=RECIPE),
            device="cpu",
        )
        for name in "ab"
    ]
    assert runs[0].record["weights_sha256"] == runs[1].record["weights_sha256"]
    assert runs[0].record["price"] == 2
    assert 1e-6 <= runs[0].record["found"]["omega"] <= 1
    assert runs[0].record["calibrated_on"] == {"Sealed(levels=2, rest='uniform')": "10 validation images"}
    lost = runs[0].record["metrics"]
    assert -1 <= lost["accuracy_lost"] <= 1
    assert lost["accuracy_lost_error"] > 0


def test_the_record_is_that_of_the_models_own_training(toy: Data, honest: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("undistill.defences.price.accuracy_lost", lambda after, before, labels: (-0.01, 1e-3))
    settings = Settings(recipe=RECIPE)
    run = protect(honest, ["Nasty(price=2)", "MAD(epochs=2)"], tmp_path / "run", settings=settings, device="cpu")
    assert run.record["epochs"] == 3
    curve = read_curve(run)
    assert curve is not None
    assert curve.shape == (3, 2), "neither that of the surrogate nor those whose networks were not kept"


def test_a_killed_training_at_a_price_ends_with_the_same_bits(honest: Run, tmp_path: Path, monkeypatch) -> None:
    """Killed in its third training."""
    monkeypatch.setattr("undistill.defences.price.accuracy_lost", lambda after, before, labels: (-0.01, 1e-3))
    monkeypatch.setattr("undistill.training.fit.CHECKPOINT_SECONDS", 0.0)
    settings = Settings(recipe=RECIPE)
    whole = protect(honest, "Nasty(price=2)", tmp_path / "whole", settings=settings, device="cpu")
    plain, rounds = Loop.one_round, iter(range(1000))

    def killed(loop: Loop) -> dict[str, float]:
        if next(rounds) == 7:
            raise KeyboardInterrupt
        return plain(loop)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "one_round", killed)
        with pytest.raises(KeyboardInterrupt):
            protect(honest, "Nasty(price=2)", tmp_path / "again", settings=settings, device="cpu")
    again = protect(honest, "Nasty(price=2)", tmp_path / "again", settings=settings, device="cpu")
    assert again.digest == whole.digest
    assert again.record["found"] == whole.record["found"]


def test_two_defences_that_train_do_not_share_a_price(honest: Run, tmp_path: Path) -> None:
    for defences in (["Nasty(price=0.5)", "Nasty(omega=0.04)"], ["CMIM()", "Nasty(price=0.5)"]):
        with pytest.raises(SpecError, match="both train the network, and a price holds for one of them"):
            protect(honest, defences, tmp_path / "run", device="cpu")
    with pytest.raises(SpecError, match="name Nasty first"):
        protect(honest, ["Sealed()", "Nasty()"], tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("Nasty(price=-1)", "price = -1 is refused: .*points of accuracy that you accept to lose"),
        ("Nasty(price=0)", "price = 0 is refused"),
        ("Nasty(price=0.5, omega=0.04)", "a price finds omega by itself; leave omega out"),
        ("Nasty(price=0.5, warm_start=0.5)", "a price finds warm_start by itself"),
        ("Nasty(omega=None)", "without a price, omega needs a value"),
    ],
)
def test_bad_prices_end_in_one_sentence(text: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        Defence.parse(text)


def test_a_price_above_the_accuracy_is_refused(toy: Data, honest: Run) -> None:
    teacher = honest.network()
    with pytest.raises(SpecError, match=r"A price of 100 points is more than the accuracy there is, 100\.0 %"):
        Nasty(price=100).check(teacher, toy.split)


def test_a_price_reads_as_it_is_written() -> None:
    spec = Defence.parse("Nasty(price=0.5)")
    assert str(spec) == "Nasty(omega=None, T=4, warm_start=None, adversary=None, price=0.5)"
    assert Defence.parse(str(spec)) == spec
    assert str(Nasty()) == "Nasty(omega=0.04, T=4, warm_start=None, adversary=None)", "stored texts stay"


def test_a_calibrated_teacher_answers_the_same_classes_with_fitting_confidence(toy: Data, honest: Run) -> None:
    network = honest.network()
    before = evaluate(network, toy.test)
    layer = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    layer.weight.data *= 0.2  # unsure
    layer.bias.data *= 0.2
    unsure = evaluate(network, toy.test)
    after = evaluate(calibrated(network, toy.split), toy.test)
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert ece(after, toy.test.labels) < 0.5 * ece(unsure, toy.test.labels)


def test_a_network_whose_last_layer_makes_no_logits_is_refused(toy: Data, honest: Run) -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = honest.network()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 0.1 * self.inner(images) ** 3

    with pytest.raises(Unsuitable, match="name --defence 'Temperature"):
        calibrated(Squared(), toy.split)
