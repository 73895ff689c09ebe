"""A price instead of omega: the weight that is found, what is believed to be lost, and what it may cost."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import RECIPE
from undistill.api import protect
from undistill.core.errors import ModelError, NonFinite, SpecError, Unsuitable, remark
from undistill.data import Data
from undistill.defences import Defence
from undistill.defences.nasty import Nasty, calibrated
from undistill.defences.price import Attempt, at_price, next_weight
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
    assert attempt(0.06, lost=1.0, error=40.0).believed == pytest.approx(4, rel=0.02), "a point at 0.03, by the square"
    assert attempt(0.06, lost=1.0, error=0.01).believed == pytest.approx(1, rel=0.02), "the measurement"
    assert attempt(0.03, lost=-1.0, error=1.0).believed == pytest.approx(0), "both are as exact"
    assert attempt(0.02, lost=30.0, error=7.0).believed == pytest.approx(23), "surely more than experience says"


def test_the_next_weight_lies_between_what_costs_less_and_more() -> None:
    less, more = attempt(0.03, 0.0, 1e-3), attempt(0.09, 8.0, 1e-3)
    between = next_weight(2.0, [less, more])
    assert between**2 == pytest.approx(0.03**2 + 0.25 * (0.09**2 - 0.03**2), rel=1e-2)
    cliff = next_weight(0.5, [less, attempt(0.09, 80.0, 1e-3)])
    assert cliff**2 == pytest.approx(0.03**2 + 0.1 * (0.09**2 - 0.03**2), rel=1e-2), "a tenth of the way at least"
    known = attempt(0.03, 0.5, 1e-3)
    assert next_weight(2.0, [known]) == pytest.approx(0.06, rel=1e-2), "by the square, from half a point to two"
    assert next_weight(0.6, [known]) == pytest.approx(1.4 * 0.03), "1.4 times as large at least"
    assert next_weight(9.0, [known]) == pytest.approx(3 * 0.03), "three times at most"
    assert next_weight(9.0, [attempt(0.01, 0.0, 1e-3), known]) == pytest.approx(1.5 * 0.03), "the last goes less far"
    unsure = attempt(0.03, -1.0, 1.0)  # believed to be 0, give or take 1 / sqrt(2)
    assert next_weight(2.0, [unsure]) == pytest.approx(0.03 * math.sqrt(2 * math.sqrt(2)))
    assert next_weight(2.0, [more]) == pytest.approx(0.09 / 2, rel=1e-2)
    assert next_weight(0.01, [more]) == pytest.approx(0.09 / 4, rel=1e-2), "four times smaller at most"


def found(
    price: float, lost: Callable[[float], float], error: float, monkeypatch: pytest.MonkeyPatch, epochs: int = 6
) -> list[float]:
    """The weights that are tried where each loses `lost(weight)` points, and at the end the one that is kept."""
    tried: list[float] = []

    def train(weight: float) -> nn.Module:
        tried.append(weight)
        if math.isnan(lost(weight)):
            raise NonFinite("the weights after it are NaN")
        return nn.Identity()

    class Nothing:
        class validation:
            labels = torch.zeros(1)

            def __len__(self) -> int:
                return 1

    Nothing.validation = Nothing.validation()  # type: ignore[assignment, misc]
    monkeypatch.setattr("undistill.defences.price.evaluate", lambda network, samples: torch.zeros(1))
    monkeypatch.setattr("undistill.defences.price.accuracy_lost", lambda *_: (lost(tried[-1]) / 100, error / 100))
    fit = Fit(RECIPE.model_copy(update={"epochs": epochs}), 0, CPU)
    at_price(price, nn.Identity(), Nothing, fit, train)  # type: ignore[arg-type]
    return [*tried, fit.found["omega"]]


CURVES = {
    "as experience": lambda w: (w / 0.03) ** 2,
    "digits": lambda w: 0.6 * (w / 0.03) ** 2,
    "CIFAR-10": lambda w: -0.75 + 0.0135 * (w / 0.03) ** 4,
    "CIFAR-100": lambda w: -0.9 + 1.15 * (w / 0.03) ** 2,
    "linear": lambda w: w / 0.03,
    "saturating": lambda w: 20 * (1 - math.exp(-w / 0.1)),
    "dear": lambda w: 5 * (w / 0.03) ** 2,
}
"""Points that are lost with a weight; those of CIFAR-10 and CIFAR-100 go through what was measured at `small`."""


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("price", [0.5, 2.0])
def test_exact_measurements_keep_the_price(name: str, price: float, monkeypatch: pytest.MonkeyPatch) -> None:
    *tried, chosen = found(price, CURVES[name], 0.05, monkeypatch)
    assert len(tried) == len(set(tried)) <= 3
    assert price - 1 <= CURVES[name](chosen) <= price + 1


def test_what_is_ruined_or_diverges_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (40.0, math.nan):
        *tried, chosen = found(0.5, lambda w, broken=broken: broken if w > 0.04 else -0.8, 0.3, monkeypatch)
        assert chosen == max(weight for weight in tried if weight <= 0.04)
        assert max(tried) > 0.04
    with pytest.raises(
        ModelError, match=r"Even with omega 0\.0013, training on costs 30\.0 points .* the price is 0\.5"
    ):
        found(0.5, lambda weight: 30.0, 1.0, monkeypatch)
    with pytest.raises(ModelError, match=r"Lower recipe\.lr"):
        found(0.5, lambda weight: math.nan, 1.0, monkeypatch)


def test_few_images_leave_it_to_experience_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remark.cache_clear()
    *tried, chosen = found(1.0, lambda weight: 0.0, 50.0, monkeypatch)
    assert tried == [0.03]
    assert chosen == 0.03
    assert "measure an accuracy to ± 98.0 points, and the price is 1" in caplog.text


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 15, 30])
def test_no_recipe_takes_more_than_one_and_a_half_trainings(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    *tried, _ = found(0.5, lambda weight: -1.0, 0.01, monkeypatch, epochs)
    assert len(tried) * math.ceil(epochs / 2) <= max(1.5 * epochs, 1)
    assert len(tried) == (3 if epochs % 2 == 0 else max(len(tried), 1))


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
    assert rounds[0] <= 1.5 * RECIPE.epochs
    assert len(fit.history) == RECIPE.epochs / 2, "the record is that of the training that was kept"
    assert fit.seconds > sum(epoch["seconds"] for epoch in fit.history) or rounds[0] == len(fit.history)
    assert set(fit.found) == {"omega"}
    assert accuracy(evaluate(network, toy.test), toy.test.labels) > 0.85


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
    known, data = runs[0].record["metrics"], runs[0].data()
    right = accuracy(evaluate(runs[0].network(), data.validation), data.validation.labels)
    assert known["accuracy_lost"] == pytest.approx(honest.record["metrics"]["validation_accuracy"] - right)
    assert known["accuracy_lost_error"] > 0


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
    monkeypatch.setattr("undistill.training.loop.CHECKPOINT_SECONDS", 0.0)
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
