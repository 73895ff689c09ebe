"""Students that are trained in the same steps are those that are trained alone, up to rounding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import RECIPE, STUDENT, TEACHER
from tests.test_fit import CPU, plain
from undistill.core.progress import Progress
from undistill.data import Data
from undistill.data.batches import Batch
from undistill.data.views import Views
from undistill.models import Model
from undistill.training.fit import Fit, Suspended
from undistill.training.loop import Loop
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Objective, Weighted
from undistill.training.recipe import Recipe
from undistill.training.stack import Branched, Unstackable, Vmapped, kind, why_alone

SHORT = RECIPE.model_copy(update={"epochs": 3})


def network(data: Data, seed: int = 0, model: str = STUDENT) -> nn.Module:
    return Model.parse(model).build(data.shape, data.num_classes, seed)


def suspended(fit: Fit, student: nn.Module, data: Data, objective: Objective) -> Loop:
    fit.suspends = True
    with pytest.raises(Suspended) as stop:
        fit(student, data.split, objective)
    return stop.value.loop


def loop(data: Data, objective: Objective = plain, seed: int = 0, recipe: Recipe = SHORT, **parts: Any) -> Loop:
    student = parts.pop("student", None) or network(data, seed)
    return suspended(Fit(recipe, seed, CPU, view_seed=0, **parts), student, data, objective)


def smoothed(share: float) -> Objective:
    def objective(student: nn.Module, batch: Batch) -> Mapping[str, Tensor | Weighted]:
        logits = student(batch.images)
        return {"ce": cross_entropy(logits, batch.labels, share), "norm": Weighted(logits.square().mean(), share)}

    return objective


def close(one: nn.Module, other: nn.Module, allowed: float = 2e-3) -> bool:
    own, its = one.state_dict(), other.state_dict()
    return all(torch.allclose(own[name].double(), its[name].double(), rtol=allowed, atol=allowed) for name in own)


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)], ids=["same order", "own orders"])
@pytest.mark.parametrize(
    "recipe",
    [
        SHORT,
        SHORT.model_copy(update={"ema": 0.9, "optimiser": "adamw", "lr": 0.01}),
        SHORT.model_copy(update={"views": Views(mixup=1.0), "selection": "best"}),
    ],
    ids=["sgd", "adamw and averages", "mixed views"],
)
def test_each_is_trained_as_if_it_were_alone(toy: Data, seeds: tuple[int, ...], recipe: Recipe) -> None:
    """Each with its own objective, learning rate and clipping."""
    members = [
        (seed, recipe.model_copy(update={"lr": recipe.lr * factor, "clip": clip}), smoothed(share))
        for seed, factor, clip, share in zip(seeds, (1.0, 0.3, 1.0), (5.0, 5.0, 0.1), (0.0, 0.1, 0.3), strict=True)
    ]
    loops = [loop(toy, objective, seed, own) for seed, own, objective in members]
    assert len({kind(one) for one in loops}) == 1
    Vmapped(loops).train(Progress.silent())
    for (seed, own, objective), one in zip(members, loops, strict=True):
        fit = Fit(own, seed, CPU, view_seed=0)
        alone = fit(network(toy, seed), toy.split, objective)
        assert close(one.result(), alone)
        for ours, theirs in zip(one.history, fit.history, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
            assert ours["members"] == 3


def test_a_stopped_stack_goes_on_alone_and_the_other_way_round(
    toy: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints are those of trainings that are done alone."""
    monkeypatch.setattr("undistill.training.loop.CHECKPOINT_SECONDS", 0.0)
    folders = [tmp_path / str(seed) for seed in range(2)]
    for folder in folders:
        folder.mkdir()
    fits = [Fit(SHORT, seed, CPU, folder, view_seed=0) for seed, folder in enumerate(folders)]
    Vmapped([suspended(fit, network(toy, fit.seed), toy, plain) for fit in fits]).one_round()
    alone = [Fit(SHORT, seed, CPU, view_seed=0)(network(toy, seed), toy.split, plain) for seed in range(2)]
    first = Fit(SHORT, 0, CPU, folders[0], view_seed=0)
    assert close(first(network(toy), toy.split, plain), alone[0])
    assert [row.get("members") for row in first.history] == [2, None, None]
    assert first.computed[0].endswith(" in a stack of 2")
    left = [loop(toy, seed=seed, folder=folders[seed]) for seed in range(2) if seed]
    left += [loop(toy, seed=5)]
    assert left[0].epoch == 1
    assert kind(left[0]) != kind(left[1]), "one is an epoch behind"


def test_branches_are_the_trainings_alone_to_the_bit(toy: Data) -> None:
    """On a GPU each makes its own steps; here they are not recorded."""
    loops = [loop(toy, smoothed(0.1), seed, SHORT) for seed in range(3)]
    Branched(loops).train(Progress.silent())
    for seed, one in enumerate(loops):
        alone = Fit(SHORT, seed, CPU, view_seed=0)(network(toy, seed), toy.split, smoothed(0.1))
        assert close(one.result(), alone, 0.0)


def test_branches_that_draw_are_done_alone(toy: Data) -> None:
    one, other = loop(toy), loop(toy, noisy)
    with pytest.raises(Unstackable, match="draws random numbers") as error:
        Branched([one, other]).train(Progress.silent())
    assert error.value.loops == [other]


def noisy(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return {"ce": cross_entropy(student(batch.images) + torch.rand(()), batch.labels)}


def twice(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return {"ce": cross_entropy(student(batch.images) + student(batch.images), batch.labels)}


def elsewhere(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return {"ce": cross_entropy(student(batch.images.flip(3)), batch.labels)}


def regularised(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    norm = sum(weight.square().sum() for weight in student.parameters())
    return {"ce": cross_entropy(student(batch.images), batch.labels) + norm}


def evaluating(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return {"ce": cross_entropy(student.eval()(batch.images), batch.labels)}


def dimming(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    logits = student(batch.images)
    batch.images.mul_(0.5)
    return {"ce": cross_entropy(logits, batch.labels)}


def seldom(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Draws in the second batch of an epoch alone."""
    seen.append(batch.epoch)
    noise = torch.rand(()) if len(seen) == 2 else 0.0
    return {"ce": cross_entropy(student(batch.images), batch.labels) + noise}


seen: list[int] = []


def broken(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    raise KeyError("nothing there")


def exploding(student: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return {"ce": cross_entropy(student(batch.images), batch.labels) * float("inf")}


@pytest.mark.parametrize(
    ("objective", "why"),
    [
        (noisy, "draws random numbers in its steps"),
        (twice, "more than once"),
        (elsewhere, "other images than the batch"),
        (regularised, "reads 'parameters' of the network"),
        (evaluating, "reads 'eval' of the network"),
        (dimming, "changes its images"),
        (seldom, "draws random numbers"),
        (broken, "KeyError.*nothing there"),
        (exploding, "term 'ce' is NaN or infinite"),
    ],
)
def test_who_cannot_be_stacked_is_named_with_the_reason(toy: Data, objective: Objective, why: str) -> None:
    one, other = loop(toy), loop(toy, objective)
    with pytest.raises(Unstackable, match=why) as error:
        Vmapped([one, other]).train(Progress.silent())
    assert error.value.loops == [other]


def test_an_objective_that_reaches_for_the_network_itself_is_done_alone(toy: Data) -> None:
    student = network(toy)

    def own(_: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"ce": cross_entropy(student(batch.images), batch.labels)}

    one, other = loop(toy), loop(toy, own, student=student)
    with pytest.raises(Unstackable, match="differentiates the network by itself") as error:
        Vmapped([one, other]).train(Progress.silent())
    assert error.value.loops == [other]


class Wired(nn.Module):
    """Holds a tensor of its own that is neither parameter nor buffer."""

    def __init__(self, inputs: int, seed: int) -> None:
        super().__init__()
        self.wiring = torch.randn(inputs, 8, generator=torch.Generator().manual_seed(seed))
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(images.flatten(1) @ self.wiring)
        return out


def test_what_a_network_holds_beside_its_weights_is_not_taken_from_another(toy: Data) -> None:
    loops = [loop(toy, student=Wired(144, seed)) for seed in range(2)]
    with pytest.raises(Unstackable, match="other answers") as error:
        Vmapped(loops).train(Progress.silent())
    assert error.value.loops == [loops[1]]


def test_members_of_a_stack_have_checkpoints_of_the_same_epoch(
    toy: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a stopped one would not go on as a stack."""
    now = 0.0
    monkeypatch.setattr("undistill.training.loop.time.monotonic", lambda: now)
    loops = []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        loops.append(loop(toy, seed=seed, folder=tmp_path / str(seed)))
        now += 0.7
    stack = Vmapped(loops)
    for _ in range(2):
        now += 0.7
        stack.one_round()
    again = [loop(toy, seed=seed, folder=tmp_path / str(seed)) for seed in range(3)]
    assert [one.epoch for one in again] == [1, 1, 1]
    assert len({kind(one) for one in again}) == 1


def test_networks_that_draw_or_are_watched_are_done_alone(toy: Data) -> None:
    flat = toy.shape[1] * toy.shape[2]

    def dropping() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(flat, toy.num_classes))

    loops = [loop(toy, student=dropping()) for _ in range(2)]
    with pytest.raises(Unstackable, match="random") as error:
        Vmapped(loops).train(Progress.silent())
    assert error.value.loops == loops
    watched = network(toy)
    watched.register_forward_hook(lambda *_: None)
    assert why_alone(loop(toy, student=watched)) == "Its network has hooks."


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": SHORT.model_copy(update={"epochs": 4})},
        {"recipe": SHORT.model_copy(update={"batch_size": 8})},
        {"recipe": SHORT.model_copy(update={"views": Views(crop=0)})},
        {"model": TEACHER},
    ],
    ids=["epochs", "batches", "views", "network"],
)
def test_only_what_is_alike_is_stacked(toy: Data, other: dict[str, Any]) -> None:
    model = other.pop("model", STUDENT)
    assert kind(loop(toy)) == kind(loop(toy, seed=3, recipe=SHORT.model_copy(update={"lr": 0.01})))
    assert kind(loop(toy)) != kind(loop(toy, student=network(toy, model=model), **other))
