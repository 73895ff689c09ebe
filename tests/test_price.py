"""A price instead of omega: the weight that is found, what is believed to be lost, and what it may cost."""

import math
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
from undistill.defences.price import NATS, Attempt, FoundWeight, at_price
from undistill.report.evidence import read_curve
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.training.fit import Fit
from undistill.training.loop import Loop
from undistill.training.metrics import accuracy, ece, evaluate

CPU = torch.device("cpu")


def test_the_weight_rises_while_the_constraint_holds_and_falls_while_it_is_broken() -> None:
    weight = FoundWeight(slack=0.1, device=CPU, start=0.01)
    assert float(weight(torch.tensor(0.0), 8)) == pytest.approx(0.01)
    assert weight.value == pytest.approx(0.01 * math.exp(0.02)), "at most two percent in a step"
    weight(torch.tensor(0.1), 8)
    assert weight.value == pytest.approx(0.01 * math.exp(0.02)), "at the slack it stays"
    for _ in range(10_000):
        weight(torch.tensor(5.0), 8)
    assert weight.value == pytest.approx(1e-6), "a broken constraint takes the term away"
    again = FoundWeight(slack=0.1, device=CPU)
    again.load_state_dict(weight.state_dict())
    assert again.value == weight.value


def test_what_is_believed_lies_between_measurement_and_experience() -> None:
    slack = NATS * 0.01  # suggests one point
    assert Attempt(nn.Identity(), slack, 0.02, lost=0.05, error=1e-6).believed == pytest.approx(0.05, rel=1e-3)
    assert Attempt(nn.Identity(), slack, 0.02, lost=0.05, error=1.0).believed == pytest.approx(0.01, rel=1e-3)
    assert Attempt(nn.Identity(), slack, 0.02, lost=0.015, error=0.005).believed == pytest.approx(0.0125)
    assert Attempt(nn.Identity(), slack, 0.02, lost=0.3, error=0.07).believed == pytest.approx(0.16), (
        "sure to be ruined"
    )


@pytest.mark.parametrize("price", [1.0, 20.0])
def test_a_price_takes_no_longer_than_one_and_a_half_trainings(price: float, toy: Data, honest: Run) -> None:
    fit, teacher = Fit(RECIPE, 0, CPU), honest.network()
    network = Nasty(price=price).protect(teacher, teacher, lambda: honest.fresh(1), toy.split, fit)
    assert len(fit.history) <= math.ceil(1.5 * RECIPE.epochs) + 2
    assert set(fit.found) == {"omega", "slack"}
    assert accuracy(evaluate(network, toy.test), toy.test.labels) > 1 - price / 100 - 0.1


def test_a_slack_that_costs_too_much_is_tightened_and_one_that_costs_nothing_is_loosened(
    toy: Data, honest: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three trainings, whose losses of accuracy are made up; that which comes nearest to the price is kept."""
    teacher, lost = honest.network(), iter([0.08, 0.02, 0.011])
    monkeypatch.setattr("undistill.defences.price.accuracy_lost", lambda after, before, labels: (next(lost), 1e-9))
    fit, slacks = Fit(RECIPE, 0, CPU), []

    def objective(found: FoundWeight):
        slacks.append(found.slack)
        return lambda network, batch: {"ce": nn.functional.cross_entropy(network(batch.images), batch.labels)}

    at_price(0.01, teacher, lambda: honest.fresh(1), toy.split, fit, objective, {})
    assert slacks == pytest.approx([0.06, 0.06 / 4, 0.06 / 4 / 2])
    assert fit.found["slack"] == pytest.approx(0.06 / 8)


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


def test_no_ruined_teacher_is_kept(toy: Data, honest: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undistill.defences.price.accuracy_lost", lambda after, before, labels: (0.3, 0.07))
    teacher = honest.network()
    with pytest.raises(ModelError, match=r"Training on costs 30.0 points .* and the price is 0.5. Lower recipe.lr"):
        Nasty(price=0.5).protect(teacher, teacher, lambda: honest.fresh(1), toy.split, Fit(RECIPE, 0, CPU))


def test_epochs_of_trainings_that_go_on_are_counted_on(toy: Data, honest: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("undistill.defences.price.accuracy_lost", lambda after, before, labels: (0.0, 1e-9))
    settings = Settings(recipe=RECIPE)
    run = protect(honest, ["Nasty(price=2)", "MAD(epochs=2)"], tmp_path / "run", settings=settings, device="cpu")
    assert run.record["epochs"] == 5 + 3 + 3
    curve = read_curve(run)
    assert curve is not None
    assert curve.shape == (11, 2), "the training of the surrogate is none of the model's"


def test_a_killed_training_at_a_price_ends_with_the_same_bits(honest: Run, tmp_path: Path, monkeypatch) -> None:
    """Killed in its second training; the weight that was found so far lies in the checkpoint."""
    monkeypatch.setattr("undistill.defences.price.accuracy_lost", lambda after, before, labels: (0.0, 1e-9))
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
