import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import RECIPE, STUDENT, TEACHER
from undistill.core.errors import NonFinite, SpecError
from undistill.data import Data, Samples, Split
from undistill.data.batches import Batch
from undistill.data.views import Views
from undistill.models import Model
from undistill.training.compute import Compute
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.optimisers import build_trained
from undistill.training.recipe import Recipe

CPU = torch.device("cpu")


def plain(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return {"ce": cross_entropy(network(batch.images), batch.labels)}


def trained(data: Split, recipe: Recipe, seed: int = 0, folder: Path | None = None, **parts: Any) -> dict[str, Tensor]:
    network = Model.parse(TEACHER).build(data.shape, data.num_classes, 0)
    objective = parts.pop("objective", plain)
    return Fit(recipe, seed, CPU, folder, **parts)(network, data, objective).state_dict()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns(toy: Data, fit: Fit) -> None:
    fit(Model.parse(TEACHER).build(toy.shape, 3, 0), toy, plain)
    assert fit.history[-1]["validation_accuracy"] > 0.9
    assert fit.history[-1]["loss"] < 0.5 * fit.history[0]["loss"]
    assert fit.history[-1]["loss"] == pytest.approx(fit.history[-1]["ce"])


def test_same_seed_same_bits(toy: Data) -> None:
    assert same(trained(toy, RECIPE), trained(toy, RECIPE))
    assert not same(trained(toy, RECIPE), trained(toy, RECIPE, seed=1))


def test_callers_generator_is_left_alone(toy: Data, fit: Fit) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fit(Model.parse(TEACHER).build(toy.shape, 3, 0), toy, plain)
    assert torch.equal(torch.rand(3), expected)


CHANGES: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 20,
    "optimiser": "adamw",
    "lr": 0.02,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "warmup": 0.5,
    "clip": 0.1,
    "ema": 0.9,
    "compute": Compute(precision="bf16"),
    "views": Views(crop=0),
}


@pytest.mark.parametrize("field", Recipe.model_fields)
def test_every_field_of_the_recipe_changes_the_run(toy: Data, field: str) -> None:
    base = RECIPE
    if field in ("drops", "gamma"):
        base = RECIPE.model_copy(update={"schedule": "step"})
        change: Any = {"drops": (0.4,), "gamma": 0.5}[field]
    elif field == "selection":
        # Validation accuracy peaks early here and falls: the last epoch is not the best one.
        base = RECIPE.model_copy(update={"lr": 2.0, "clip": 0.0, "epochs": 8})
        change = "best"
    else:
        change = CHANGES[field]
    changed = Recipe(**(base.model_dump() | {field: change}))
    assert not same(trained(toy, base), trained(toy, changed))


@pytest.mark.parametrize("field", Views.model_fields)
def test_every_field_of_the_views_changes_the_run(toy: Data, field: str) -> None:
    change = {"crop": 0.0, "flip": True, "rotate": 20.0, "cutout": 0.5, "mixup": 1.0, "cutmix": 1.0, "n_views": 2}[
        field
    ]
    recipe = RECIPE.model_copy(update={"views": Views(**{field: change})})
    assert not same(trained(toy, RECIPE), trained(toy, recipe))


def test_what_is_made_once_is_timed_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def make() -> torch.Tensor:
        clock[0] += 5
        return torch.rand(3)

    first, again = (Fit(Recipe(), 0, torch.device("cpu"), tmp_path) for _ in range(2))
    made = first.once("noise", make, (3,))
    assert torch.equal(again.once("noise", lambda: torch.zeros(3), (3,)), made)
    assert first.seconds == again.seconds == 5


def test_answers_that_are_not_finite_end_the_training(toy: Data, fit: Fit) -> None:
    """Weights may be finite where what they answer is not."""
    network = Model.parse(STUDENT).build(toy.shape, 3, 0)
    norm, final = network[2][1], network[-1]

    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            norm.weight.fill_(1e6)
            final.weight.fill_(3e38)
        return {"none": 0 * final.bias.sum()}

    with pytest.raises(NonFinite, match=r"epoch 1 of 6: on validation images: The network answers NaN or infinity to"):
        fit(network, toy, objective)


def test_a_term_beyond_its_bound_ends_the_training(toy: Data, fit: Fit) -> None:
    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"undermining": 0 * network(batch.images).sum() + 0.5}

    network = Model.parse(STUDENT).build(toy.shape, 3, 0)
    with pytest.raises(NonFinite, match=r"the term 'undermining' is 0\.5 and cannot exceed 0\.1"):
        fit(network, toy, objective, bounds={"undermining": 0.1})
    fit(network, toy, objective, bounds={"undermining": 0.6})


def test_non_finite_buffers_stop(toy: Data, fit: Fit) -> None:
    network = Model.parse(TEACHER).build(toy.shape, 3, 0)

    def poisons(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        terms = plain(network, batch)
        next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)).running_var.data.fill_(torch.inf)
        return terms

    with pytest.raises(NonFinite, match="running_var"):
        fit(network, toy, poisons)


def test_non_finite_term_stops_and_is_named(toy: Data, fit: Fit) -> None:
    def explodes(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        terms = dict(plain(network, batch))
        return terms | {"undermining": terms["ce"] * (math.inf if batch.epoch == 2 else 1.0)}

    with pytest.raises(NonFinite, match=r"epoch 3 of 6: the term 'undermining'.* recipe\.lr .*recipe\.clip"):
        fit(Model.parse(TEACHER).build(toy.shape, 3, 0), toy, explodes)


def test_non_finite_weights_stop_even_if_the_loss_was_fine(toy: Data) -> None:
    class InfiniteGradient(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient * math.inf

    def breaks(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        loss = plain(network, batch)["ce"]
        last = batch.index.shape[0] and batch.epoch == 0 and breaks.calls == 0  # type: ignore[attr-defined]
        breaks.calls += 1  # type: ignore[attr-defined]
        return {"ce": InfiniteGradient.apply(loss) if last else loss}

    breaks.calls = 0  # type: ignore[attr-defined]
    recipe = Recipe(**(RECIPE.model_dump() | {"epochs": 1, "batch_size": 500, "clip": 0}))
    with pytest.raises(NonFinite, match="the weights after it"):
        trained(toy, recipe, objective=breaks)


def test_many_validation_images_do_not_slow_a_training_on_few(
    toy: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images, 30 of validation: measured after every second of 205 epochs, resumed there, with the same bits."""
    few = Split(toy.classes, toy.train[torch.tensor([0, 40, 70])], toy.test[torch.arange(30) % len(toy.test)])
    recipe = RECIPE.model_copy(update={"epochs": 205, "batch_size": 4})

    def run(network: nn.Module, folder: Path | None, stop: int = 0) -> list[float]:
        fit = Fit(recipe, 0, CPU, folder)

        def objective(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            if stop and batch.epoch == stop:
                raise KeyboardInterrupt
            return plain(student, batch)

        fit(network, few, objective)
        return [row["epoch"] for row in fit.history]

    first, second = (Model.parse(STUDENT).build(toy.shape, 3, 0) for _ in range(2))
    epochs = run(first, None)
    assert epochs == [*range(2, 205, 2), 205]
    monkeypatch.setattr("undistill.training.loop.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(second, tmp_path, stop=111)
    again = Model.parse(STUDENT).build(toy.shape, 3, 0)
    assert run(again, tmp_path) == epochs
    assert same(first.state_dict(), again.state_dict())


def test_best_selection_keeps_the_best_validation_epoch(toy: Data) -> None:
    recipe = Recipe(**(RECIPE.model_dump() | {"lr": 2.0, "clip": 0, "epochs": 8, "selection": "best"}))
    network = Model.parse(TEACHER).build(toy.shape, 3, 0)
    fit = Fit(recipe, 0, CPU)
    fit(network, toy, plain)
    from undistill.training.metrics import accuracy, evaluate

    kept = accuracy(evaluate(network, toy.validation), toy.validation.labels)
    assert kept == max(epoch["validation_accuracy"] for epoch in fit.history)
    assert kept > fit.history[-1]["validation_accuracy"]


def rates(recipe: Recipe, steps: int) -> list[float]:
    (trained,) = build_trained(nn.Linear(1, 1), (), recipe, steps)
    seen = []
    for _ in range(steps):
        seen.append(trained.optimiser.param_groups[0]["lr"])
        trained.step()
    return seen


def test_step_schedule_is_the_papers() -> None:
    """CIFAR-10: 0.1, times 0.1 at epochs 80 and 120 of 160."""
    found = rates(Recipe(lr=0.1, schedule="step", warmup=0, drops=(0.5, 0.75)), 160)
    assert found == pytest.approx([0.1] * 80 + [0.01] * 40 + [0.001] * 40)


def test_cosine_schedule_with_warmup() -> None:
    found = rates(Recipe(lr=1.0, schedule="cosine", warmup=0.2), 50)
    assert found[:10] == pytest.approx([(1 + 0.9 * step) / 10 for step in range(10)], abs=1e-6)
    assert found[30] == pytest.approx(0.5, abs=0.02)
    assert found[-1] < 0.01


def test_one_cycle_schedule() -> None:
    found = rates(Recipe(lr=1.0, schedule="one_cycle", warmup=0.3), 100)
    assert max(found) == pytest.approx(1.0, abs=1e-3)
    assert found.index(max(found)) == pytest.approx(30, abs=1)
    assert found[0] < 0.1
    assert found[-1] < 0.01


@pytest.mark.parametrize(("count", "size", "expected"), [(33, 16, [11, 11, 11]), (5, 2, [3, 2]), (3, 2, [3])])
def test_no_batch_has_a_single_image(count: int, size: int, expected: list[int]) -> None:
    """Batch norm cannot learn from one sample."""
    samples = Samples(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), torch.arange(count) % 3)
    sizes: list[int] = []

    def watches(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        sizes.append(len(batch.images))
        return plain(network, batch)

    trained(Split(("a", "b", "c"), samples, samples), Recipe(epochs=1, batch_size=size), objective=watches)
    assert sizes == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"schedule": "one_cycle", "warmup": 0}, "warmup must be above 0"),
        ({"drops": (0.5, 1.5)}, "between 0 and 1"),
        ({"lr": -1}, "lr = -1 is refused"),
        ({"optimizer": "sgd"}, "did you mean 'optimiser'"),
        ({"schedule": "onecycle"}, "'step', 'cosine' or 'one_cycle'"),
        ({"views": {"flop": True}}, "did you mean 'flip'"),
    ],
)
def test_bad_recipes_are_explained(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Recipe(**fields)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_learns_on_a_gpu_in_bf16(toy: Data) -> None:
    fit = Fit(RECIPE.model_copy(update={"compute": Compute(precision="bf16")}), 0, torch.device("cuda"))
    fit(Model.parse(TEACHER).build(toy.shape, 3, 0), toy, plain)
    assert fit.history[-1]["validation_accuracy"] > 0.9
