"""Steps that are recorded and replayed: what must happen at each of them, and that they are the steps there were."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from tests.conftest import RECIPE, STUDENT, TEACHER, students
from tests.test_fit import CPU, plain
from undistill.attacks import Attack
from undistill.core.errors import BudgetExceeded
from undistill.core.progress import Progress
from undistill.core.seeds import seeded
from undistill.data import Data
from undistill.data.batches import Batch
from undistill.models import Model
from undistill.training import captured
from undistill.training.captured import LEAST, Recording, Steps, each_step, is_recording, keep, rates_on_device
from undistill.training.compute import EXACT, Compute
from undistill.training.fit import Fit, Suspended
from undistill.training.loop import Loop
from undistill.training.losses import cross_entropy, undermining
from undistill.training.objectives import Objective
from undistill.training.optimisers import Extra
from undistill.training.recipe import Recipe
from undistill.training.stack import stack_of
from undistill.victims.oracle import Access, Oracle

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


class Played:
    """A recorded step without a graph: at each replay it runs on its own copies of the inputs."""

    made = 0

    def __init__(self, step: Callable[..., Tensor], inputs: Sequence[Tensor], optimisers: object, memory: object):
        type(self).made += 1
        self.step = step

    def __call__(self, *inputs: Tensor) -> Tensor:
        return -self.step(*inputs)  # so that a test sees which ones were replayed


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Steps]:
    monkeypatch.setattr(captured, "Recorded", Played)
    monkeypatch.setattr(captured, "GraphMemory", lambda device: object())
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Played, "made", 0)
    return partial(Steps, optimisers=[], device=CPU, why="")


def test_the_first_of_each_size_is_done_as_it_is_and_the_others_are_replayed(steps: Callable[..., Steps]) -> None:
    step = steps(lambda batch: batch.sum())
    sizes = [4] * 3 + [3] * 2
    done = [step(torch.ones(size), left=10).item() for size in sizes]
    assert done == [4, -4, -4, 3, -3]
    step.new_epoch()
    assert not step.is_recorded
    assert step(torch.ones(4), left=10) == 4, "recorded anew in every epoch"
    assert Played.made == 3


def test_what_would_hardly_be_replayed_is_not_recorded(steps: Callable[..., Steps]) -> None:
    step = steps(lambda batch: batch.sum())
    assert [step(torch.ones(2), left=LEAST - 1).item() for _ in range(3)] == [2, 2, 2]
    assert not step.is_recorded
    assert not step.why


def test_a_step_that_cannot_be_recorded_stays_as_it_is_and_says_why(
    steps: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    mended: list[torch.device] = []
    monkeypatch.setattr(captured, "Recorded", refuse)
    monkeypatch.setattr(captured, "mend", mended.append)
    step = steps(lambda batch: batch.sum())
    assert [step(torch.ones(2), left=10).item() for _ in range(3)] == [2, 2, 2]
    assert step.why == "RuntimeError: operation not permitted when stream is capturing"
    assert mended == [CPU]
    step.new_epoch()
    assert step(torch.ones(2), left=10) == 2


@pytest.mark.parametrize(
    "draw", [random.random, np.random.random, lambda: torch.rand(1)], ids=["python", "numpy", "torch"]
)
def test_what_draws_in_main_memory_is_not_recorded(steps: Callable[..., Steps], draw: Callable[[], Any]) -> None:
    """It would be drawn once, when the step is recorded."""
    step = steps(lambda batch: batch.sum() + 0 * draw())
    assert [step(torch.ones(2), left=10).item() for _ in range(2)] == [2, 2]
    assert step.why == "random numbers are drawn in main memory"


def test_a_cpu_and_an_objective_that_does_not_say_so_are_never_recorded(toy: Data) -> None:
    def why(**parts: bool) -> str:
        fit = Fit(RECIPE, 0, CPU, suspends=True)
        with pytest.raises(Suspended) as stop:
            fit(Model.parse(STUDENT).build(toy.shape, 3, 0), toy.split, plain, **parts)
        return stop.value.loop.steps.why

    assert why() == "not on a GPU"
    assert why(capturable=True) == "not on a GPU"


@contextmanager
def recorded() -> Iterator[Recording]:
    """Inside, a step is recorded, as far as anybody can tell."""
    recording = Recording()
    token = captured._recording.set(recording)
    try:
        yield recording
    finally:
        captured._recording.reset(token)


def test_what_the_device_cannot_do_is_done_at_every_replay() -> None:
    done: list[int] = []
    each_step(lambda: done.append(1))
    assert done == [1]
    with recorded() as recording:
        each_step(lambda: done.append(2))
        assert is_recording()
        assert keep(done) is done
    assert not is_recording()
    assert recording.kept == [done]
    assert done == [1], "not while it is recorded"
    for _ in range(2):
        recording.acts[0]()
    assert done == [1, 2, 2]


def test_a_budget_is_kept_by_replays_too(toy: Data) -> None:
    """The oracle bills at each of them, before the answer."""
    oracle = Oracle(Model.parse(TEACHER).build(toy.shape, 3, 0), Access.QUERY, budget=8)
    images = torch.rand(4, *toy.shape)
    with recorded() as recording:
        oracle(Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4), 0))
    assert oracle.ledger.billed == 0
    for replay in range(2):
        for act in recording.acts:
            act()
        assert (oracle.ledger.billed, oracle.ledger.distinct) == (4 * (replay + 1),) * 2
    with pytest.raises(BudgetExceeded):
        recording.acts[0]()


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_rates_come_from_the_device_only_while_a_step_is_recorded(kind: Any) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimiser = kind([{"params": [weight], "lr": 0.25}], lr=0.1)
    before = optimiser.state_dict()["param_groups"]
    with rates_on_device(optimiser) as rates:
        assert isinstance(optimiser.param_groups[0]["lr"], Tensor)
        assert optimiser.param_groups[0].get("capturable", True)
    assert optimiser.state_dict()["param_groups"] == before
    optimiser.param_groups[0]["lr"] = 0.5
    rates.refresh()
    assert rates.on_device[0] == 0.5


def network(data: Data, seed: int = 0) -> nn.Module:
    return Model.parse(STUDENT).build(data.shape, data.num_classes, seed)


@contextmanager
def eager() -> Iterator[None]:
    """Inside, nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "LEAST", 1_000_000)
        yield


LONG = RECIPE.model_copy(update={"epochs": 4, "batch_size": 6, "lr": 0.02})
"""Thirteen steps an epoch and more."""


def objectives(data: Data) -> dict[str, tuple[Objective, list[Extra]]]:
    fit = Fit(LONG, 0, CUDA)
    honest = fit.answers(Model.parse(TEACHER).build(data.shape, data.num_classes, 7))
    with seeded(0):
        scale = nn.Linear(data.num_classes, data.num_classes)

    def nasty(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        logits = network(batch.images)
        return {"ce": cross_entropy(logits, batch.labels), "apart": 0.01 * undermining(logits, honest(batch), 4.0)}

    def rising(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), batch.labels) * (batch.epoch + 1)}

    def mapped(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"ce": cross_entropy(scale(network(batch.images).float()), batch.labels)}

    return {
        "normal": (plain, []),
        "nasty": (nasty, []),
        "rising": (rising, []),
        "beside": (mapped, [Extra(scale, "adam")]),
    }


@needs_cuda
@pytest.mark.parametrize("recipe", [LONG, LONG.model_copy(update={"ema": 0.9, "optimiser": "adamw", "lr": 0.01})])
@pytest.mark.parametrize("name", ["normal", "nasty", "rising", "beside"])
def test_recorded_steps_are_the_eager_ones(name: str, recipe: Recipe, toy: Data) -> None:
    """After some fifty steps: weights within a thousandth, or a hundredth with Adam, which magnifies rounding."""

    def run() -> tuple[nn.Module, Fit]:
        objective, extra = objectives(toy)[name]
        fit = Fit(recipe, 0, CUDA)
        with seeded(0):
            return fit(network(toy), toy.split, objective, extra=extra, capturable=True), fit

    recorded, fit = run()
    with eager():
        expected, other = run()
    assert fit.computed == [f"{EXACT}, captured"]
    assert other.computed == [f"{EXACT}, eager"]
    for one, two in zip(recorded.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-2 if recipe.optimiser == "adamw" else 1e-3)
    assert [row["lr"] for row in fit.history] == [row["lr"] for row in other.history]
    assert fit.history[-1]["loss"] == pytest.approx(other.history[-1]["loss"], rel=1e-2)


@needs_cuda
@pytest.mark.parametrize("attack", ["SoftLabels()", "DKD(warmup=0.5)", "AffineMap()", "Averager()", "Chain()"])
def test_recorded_attacks_ask_as_much_and_learn_the_same(attack: str, toy: Data) -> None:
    def run() -> tuple[nn.Module, Oracle, Fit]:
        victim = Model.parse(TEACHER).build(toy.shape, toy.num_classes, 3).to(CUDA)
        oracle, fit = Oracle(victim, Access.QUERY), Fit(LONG, 0, CUDA)
        with seeded(0):
            return Attack.parse(attack).run(oracle, students(toy), toy.attackers(0.1, 0), fit), oracle, fit

    recorded, oracle, fit = run()
    with eager():
        expected, other, _ = run()
    assert all(said.endswith(", captured") for said in fit.computed)
    assert (oracle.ledger.billed, oracle.ledger.distinct) == (other.ledger.billed, other.ledger.distinct)
    for one, two in zip(recorded.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-2, atol=1e-2)


@needs_cuda
def test_graphs_take_no_more_memory_from_epoch_to_epoch(toy: Data) -> None:
    reserved: list[int] = []
    fit = Fit(LONG.model_copy(update={"epochs": 12}), 0, CUDA)
    fit.watch = lambda _: reserved.append(torch.cuda.memory_reserved())
    fit(network(toy), toy.split, plain, capturable=True)
    assert reserved[-1] == reserved[2]


@needs_cuda
def test_after_a_failed_recording_all_goes_on(toy: Data) -> None:
    """Random numbers are drawn on the GPU, and another training is recorded."""

    def reads(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        loss = cross_entropy(network(batch.images), batch.labels)
        return {"ce": loss * (2.0 if loss.item() > 100 else 1.0)}

    fit = Fit(LONG, 0, CUDA)
    fit(network(toy), toy.split, reads, capturable=True)
    torch.rand(3, device=CUDA)
    again = Fit(LONG, 0, CUDA)
    again(network(toy), toy.split, plain, capturable=True)
    assert again.computed[0].endswith(", captured")


@needs_cuda
def test_a_stopped_training_goes_on_recorded(toy: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undistill.training.loop.CHECKPOINT_SECONDS", 0.0)
    expected = Fit(LONG, 0, CUDA)(network(toy), toy.split, plain, capturable=True)

    def stops(_: nn.Module) -> None:
        raise KeyboardInterrupt

    fit = Fit(LONG, 0, CUDA, tmp_path)
    fit.watch = lambda _: stops(_) if fit.history or len(list(tmp_path.iterdir())) else None
    with pytest.raises(KeyboardInterrupt):
        fit(network(toy), toy.split, plain, capturable=True)
    again = Fit(LONG, 0, CUDA, tmp_path)(network(toy), toy.split, plain, capturable=True)
    for one, two in zip(again.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3)


@needs_cuda
def test_a_budget_ends_a_recorded_attack(toy: Data) -> None:
    victim = Model.parse(TEACHER).build(toy.shape, toy.num_classes, 3).to(CUDA)
    oracle = Oracle(victim, Access.QUERY, budget=150)
    with pytest.raises(BudgetExceeded):
        Attack.parse("SoftLabels()").run(oracle, students(toy), toy.attackers(0.1, 0), Fit(LONG, 0, CUDA))
    assert oracle.ledger.billed <= 150


@needs_cuda
def test_an_objective_that_reads_from_the_device_is_done_eagerly(toy: Data) -> None:
    def reads(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        loss = cross_entropy(network(batch.images), batch.labels)
        return {"ce": loss * (2.0 if loss.item() > 100 else 1.0)}

    fit = Fit(LONG, 0, CUDA)
    fit(network(toy), toy.split, reads, capturable=True)
    assert "captur" in fit.computed[0].partition(", eager: ")[2], "the error of the objective, not that of the end"
    again = Fit(LONG, 0, CUDA)
    again(network(toy), toy.split, plain)
    assert again.computed[0].endswith("eager: its objective is not said to be capturable")


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_stack_is_the_students_alone(precision: Any, toy: Data) -> None:
    recipe = LONG.model_copy(update={"compute": Compute(precision=precision)})

    def loop(seed: int) -> Loop:
        fit = Fit(recipe, seed, CUDA, view_seed=0, suspends=True)
        with pytest.raises(Suspended) as stop:
            fit(network(toy, seed), toy.split, plain, capturable=True)
        return stop.value.loop

    loops = [loop(seed) for seed in range(3)]
    stack_of(loops).train(Progress.silent())
    allowed = {"fp32": 1e-2, "bf16": 0.2}[precision]
    for seed, one in enumerate(loops):
        alone = Fit(recipe, seed, CUDA, view_seed=0)(network(toy, seed), toy.split, plain, capturable=True)
        assert one.manner.endswith("in a stack of 3, captured")
        for ours, theirs in zip(one.result().parameters(), alone.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=allowed, atol=allowed)
