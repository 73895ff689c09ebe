import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import RECIPE, STUDENT, TEACHER
from undistill.core.errors import FileError, NonFinite, SpecError
from undistill.core.tensors import write_tensors
from undistill.data import Data, Samples, Split
from undistill.data.batches import Batch
from undistill.data.views import Views
from undistill.models import Model
from undistill.training import fit as fit_module
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


@pytest.mark.parametrize("schedule", ["step", "cosine", "one_cycle"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_stopped_run_ends_with_the_same_bits(
    toy: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, optimiser: str
) -> None:
    recipe = Recipe(epochs=6, batch_size=16, schedule=schedule, optimiser=optimiser, ema=0.9, selection="best")
    monkeypatch.setattr(fit_module, "CHECKPOINT_SECONDS", 0.0)
    steps = 0

    def stops(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        nonlocal steps
        steps += 1
        if steps == 20:  # in the middle of epoch 4
            raise KeyboardInterrupt
        return plain(network, batch)

    with pytest.raises(KeyboardInterrupt):
        trained(toy, recipe, folder=tmp_path, objective=stops)
    epochs: list[int] = []

    def watches(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        epochs.append(batch.epoch)
        return plain(network, batch)

    resumed = trained(toy, recipe, folder=tmp_path, objective=watches)
    assert min(epochs) == 3
    assert same(resumed, trained(toy, recipe))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_what_is_carried_is_restored(toy: Data, tmp_path: Path) -> None:
    class Counter:
        count = 0

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    first, second = Counter(), Counter()

    def counts(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        first.count += len(batch.images)
        return plain(network, batch)

    trained(toy, RECIPE, folder=tmp_path, objective=counts, carried=(first,))
    trained(toy, RECIPE, folder=tmp_path, objective=counts, carried=(second,))
    assert second.count == first.count == RECIPE.epochs * len(toy.train)


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


def test_damaged_checkpoint_starts_again(toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint-0.pt").write_bytes(b"PK\x03\x04 half a file")
    assert same(trained(toy, RECIPE, folder=tmp_path), trained(toy, RECIPE))
    assert "damaged" in caplog.text


def recipes() -> list[Recipe]:
    """One for every schedule and optimiser, with averaged weights and the best ones kept."""
    schedules = [("step", 0.0), ("step", 0.2), ("cosine", 0.0), ("cosine", 0.2), ("one_cycle", 0.2)]
    fields = RECIPE.model_dump() | {"ema": 0.9, "selection": "best"}
    return [
        Recipe(**(fields | {"schedule": schedule, "warmup": warmup, "optimiser": optimiser}))
        for schedule, warmup in schedules
        for optimiser in ("sgd", "adamw")
    ]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: f"{r.optimiser}-{r.schedule}-{r.warmup:g}")
def test_the_checkpoints_of_every_recipe_are_recognised(
    recipe: Recipe, toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(toy, recipe, folder=tmp_path)
    resumed = trained(toy, recipe, folder=tmp_path)
    assert not caplog.text
    assert [*map(torch.equal, whole.values(), resumed.values())] == [True] * len(whole)


def forge(path: Path, **changed: object) -> None:
    """Change a checkpoint and give it the hash of what it now holds, as a stranger would."""
    write_tensors(path, torch.load(path, weights_only=True) | changed)


FORGED = {
    "network": {"0.0.weight": torch.zeros(2)},
    "extra": [{"scale": torch.zeros(2)}],
    "trained": [{"optimiser": {"state": {}, "param_groups": []}, "schedule": {"step": 5}}],
    "best": {},
    "epoch": 99,
    "history": [{"epoch": "one"}],
    "carried": 5,
}
EPOCH = {
    "loss": 1.0,
    "ce": 1.0,
    "lr": 0.1,
    "validation_accuracy": 0.5,
    "validation_nll": 1.0,
    "seconds": 1.0,
    "epoch": 1,
}
EPOCHS = {
    "no time": {name: value for name, value in EPOCH.items() if name != "seconds"},
    "text for a time": EPOCH | {"seconds": "x"},
    "a time below 0": EPOCH | {"seconds": -1e9},
    "NaN": EPOCH | {"validation_nll": math.nan},
    "another epoch than the schedule's": EPOCH,
}


@pytest.mark.parametrize("what", EPOCHS)
def test_a_checkpoint_with_impossible_epochs_is_not_used(
    what: str, toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 3})
    trained(toy, recipe, folder=tmp_path)
    forge(tmp_path / "checkpoint-0.pt", epoch=1, history=[EPOCHS[what]])
    trained(toy, recipe, folder=tmp_path)
    assert "checkpoint-0.pt is not of this training (" in caplog.text


def test_a_hostile_pickle_with_the_right_hash_is_not_used(
    toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(toy, RECIPE, folder=tmp_path)
    path = tmp_path / "checkpoint-0.pt"
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            evil = b"cos\nsystem\n(S'exit'\ntR."
            new.writestr(name, evil if name.endswith("data.pkl") else old.read(name))
    content = bytearray(buffer.getvalue())
    content[-2:] = (64).to_bytes(2, "little")
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    again = trained(toy, RECIPE, folder=tmp_path)
    assert "checkpoint-0.pt is damaged (UnpicklingError" in caplog.text
    assert same(whole, again)


def test_what_this_machine_cannot_read_is_not_thrown_away(
    toy: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that is killed for lack of memory does not make a checkpoint damaged."""
    trained(toy, RECIPE, folder=tmp_path)
    before = (tmp_path / "checkpoint-0.pt").read_bytes()
    monkeypatch.setattr("undistill.core.tensors.FORKS", True)
    monkeypatch.setattr("undistill.core.tensors.in_child", lambda *_, **__: "SIGKILL, most likely for lack of memory")
    with pytest.raises(FileError, match=r"checkpoint-0\.pt cannot be read here \(SIGKILL.*Free memory"):
        trained(toy, RECIPE, folder=tmp_path)
    assert (tmp_path / "checkpoint-0.pt").read_bytes() == before


def test_a_checkpoint_too_large_to_be_read_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tensors(tmp_path / "x.pt", {"a": torch.zeros(1000)}, largest=3000)
    assert "is not kept" in caplog.text
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("name", FORGED)
def test_a_checkpoint_of_another_form_is_not_used(
    name: str, toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(toy, RECIPE, folder=tmp_path)
    forge(tmp_path / "checkpoint-0.pt", **{name: FORGED[name]})
    again = trained(toy, RECIPE, folder=tmp_path)
    assert "checkpoint-0.pt is not of this training" in caplog.text
    assert all(map(torch.equal, whole.values(), again.values())), "it began again"


@pytest.mark.parametrize("part", ["momentum", "schedule"])
def test_an_optimiser_of_another_form_is_not_used(
    part: str, toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(toy, RECIPE, folder=tmp_path)
    state = torch.load(tmp_path / "checkpoint-0.pt", weights_only=True)
    (held,) = state["trained"]
    if part == "momentum":
        held["optimiser"]["state"][0]["momentum_buffer"] = torch.zeros(7)
    else:
        held["schedule"]["last_epoch"] += 1
    forge(tmp_path / "checkpoint-0.pt", **state)
    trained(toy, RECIPE, folder=tmp_path)
    assert "its optimiser has another form" in caplog.text


def test_a_checkpoint_of_another_network_is_not_used(
    toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(toy, RECIPE, folder=tmp_path)
    other = Model.parse("ConvNet(width=5)").build(toy.shape, 3, 0)
    alone = deepcopy(other)
    Fit(RECIPE, 0, CPU, tmp_path)(other, toy, plain)
    Fit(RECIPE, 0, CPU)(alone, toy, plain)
    assert "its network has another form" in caplog.text
    assert all(map(torch.equal, other.state_dict().values(), alone.state_dict().values()))


def test_a_flipped_bit_in_a_checkpoint_is_noticed(toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trained(toy, RECIPE, folder=tmp_path)
    path = tmp_path / "checkpoint-0.pt"
    content = bytearray(path.read_bytes())
    weight = next(value for value in torch.load(path, weights_only=True)["network"].values() if value.ndim == 4)
    content[content.find(weight.numpy().tobytes()) + 2] ^= 0x40
    path.write_bytes(content)
    again = trained(toy, RECIPE, folder=tmp_path)
    assert "checkpoint-0.pt is damaged (its hash is another); that part starts again" in caplog.text
    assert all(map(torch.equal, whole.values(), again.values()))


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
