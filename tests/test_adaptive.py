"""Skeptical students, reweighted answers, smoothed queries."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import RECIPE, STUDENT, students
from tests.test_victims import jobs
from undistill.attacks import Attack
from undistill.attacks.adaptive.query_smoothing import Copies
from undistill.attacks.adaptive.reweighting import hold_out, logits_around_step, soft_losses, weights_of
from undistill.attacks.adaptive.skeptical import Heads, head
from undistill.core.errors import ModelError
from undistill.core.progress import Progress
from undistill.core.seeds import seeded
from undistill.data import Data
from undistill.data.batches import Batch, ViewDataset
from undistill.data.views import Views, to_float
from undistill.models import Model
from undistill.runs.run import Run
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.metrics import evaluate
from undistill.victims.oracle import Access, Oracle

CPU = torch.device("cpu")


def test_a_student_whose_skepticism_is_whole_does_not_ask_what_it_hears(toy: Data, honest: Run, victim: Run) -> None:
    """With alpha 0 the victim's answers make no difference: the control with the same heads."""
    data = toy.attackers(0.1, 0)

    def copied(run: Run, alpha: float) -> Tensor:
        with seeded(0):
            attack, oracle = Attack.parse(f"Skeptical(alpha={alpha})"), Oracle(run.network(), Access.QUERY)
            return evaluate(attack.run(oracle, students(toy), data, Fit(RECIPE, 0, CPU)), toy.test)

    answers = [copied(run, alpha) for alpha in (0, 0.9) for run in (honest, victim)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[2], answers[3])


def test_heads_are_on_maps_and_leave_no_hooks() -> None:
    network = Model.parse(STUDENT).build((1, 12, 12), 3, 0)
    stages = Model.parse(STUDENT).stages(network)[:-1]
    data = type("Shapes", (), {"shape": (1, 12, 12), "num_classes": 3})
    heads = Heads(network, stages, data)  # type: ignore[arg-type]
    with heads.reading(stages):
        network(torch.rand(5, 1, 12, 12))
        assert [tuple(logits.shape) for logits in heads()] == [(5, 3)] * len(stages)
    assert not any(module._forward_hooks for module in network.modules())
    assert head(torch.rand(2, 7, 16), 3)(torch.rand(4, 7, 16)).shape == (4, 3)
    assert head(torch.rand(2, 16), 3)(torch.rand(4, 16)).shape == (4, 3)


def test_a_skeptical_student_needs_stages(toy: Data, honest: Run) -> None:
    class One:
        def __call__(self, number: int = 0) -> nn.Module:
            return nn.Linear(1, 1)

        def stages(self, network: nn.Module) -> list[nn.Module]:
            return [network]

    with pytest.raises(ModelError, match="a single one"):
        Attack.parse("Skeptical()").check(honest.network(), One())


def test_weights_of_gains_by_hand() -> None:
    weights = weights_of(torch.tensor([0.0, math.log(3), 50.0, -50.0]), 1.0)
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[1] / weights[0]) == pytest.approx(3, rel=1e-4)
    assert float(weights[2] / weights[0]) == pytest.approx(math.exp(10), rel=1e-3)


def test_planted_wrong_answers_lose_weight(toy: Data) -> None:
    """Answers of which a third name another class than the one that is right."""
    network = Model.parse("ConvNet(width=4)").build(toy.shape, 3, 0)
    Fit(RECIPE.model_copy(update={"epochs": 2}), 0, CPU)(
        network, toy.split, lambda student, batch: {"ce": cross_entropy(student(batch.images), batch.labels)}
    )
    rest, held = hold_out(toy.train, 0.3, 0)
    images, wrong = to_float(rest.pixels), torch.arange(len(rest)) % 3 == 0
    answers = 5 * F.one_hot(torch.where(wrong, (rest.labels + 1) % 3, rest.labels), 3).float()
    around = logits_around_step(network.train(), to_float(held.pixels), held.labels, images)
    before, after = (soft_losses(answers, logits, 1.0) for logits in around)
    weights = weights_of((before - after) / 1e-3, 1.0)
    assert weights[wrong].mean() < 0.7 * weights[~wrong].mean()


def test_a_trial_step_is_undone(toy: Data) -> None:
    network = Model.parse(STUDENT).build(toy.shape, 3, 0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits_around_step(network, to_float(toy.test.pixels), toy.test.labels, to_float(toy.test.pixels))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_trial_step_is_computed_in_fp32_under_autocast(toy: Data) -> None:
    network = Model.parse(STUDENT).build(toy.shape, 3, 0).train()
    given = to_float(toy.test.pixels), toy.test.labels, to_float(toy.train.pixels)
    exact = logits_around_step(network, *given)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_around_step(network, *given)
    assert all(torch.equal(one, other) for one, other in zip(exact, found, strict=True))
    assert not torch.equal(*exact)


def test_smoothed_answers_are_the_mean_of_the_answers_to_copies(toy: Data, honest: Run) -> None:
    oracle, network = Oracle(honest.network(), Access.QUERY), honest.network()
    copies = [ViewDataset(toy.train, Views(crop=0.25), seed, 3) for seed in range(3)]
    index = torch.arange(8)
    shown = Batch.of(copies[0], 2, index, to_float(copies[0].show(2, index)[0]), toy.train.labels[index])
    found = Copies(oracle, copies, CPU)(shown)
    with torch.no_grad():
        p = torch.stack([network(to_float(one.show(2, index)[0])).softmax(1) for one in copies]).mean(0)
    assert torch.allclose(found.log_p.exp(), p, atol=1e-4)
    assert oracle.ledger.billed == 24


def test_a_trial_step_drops_the_same_units_before_and_after() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    images = torch.rand(8, 1, 4, 4)
    before, after = logits_around_step(network, images, torch.arange(8) % 3, images)
    assert torch.allclose(before, after, atol=0.01)
    assert not torch.equal(before, after)


def test_answers_to_copies_are_remembered(victim: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (job, *_), (again, *_) = (jobs(victim, "QuerySmoothing()") for _ in range(2))
    first = job.run(tmp_path / "first", Progress.silent())
    asked = again.pair.victims["victim"].answers
    known = again.run(tmp_path / "again", Progress.silent())
    assert (known.accuracy, known.queries) == (first.accuracy, first.queries)
    assert asked.computed == 0
    assert not caplog.records
