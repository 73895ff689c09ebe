"""Checkpoints of a training: found again to the bit, or refused if they are damaged, forged or of another."""

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

from tests.conftest import RECIPE
from tests.test_fit import CPU, plain, same, trained
from undistill.core.errors import FileError
from undistill.core.tensors import write_tensors
from undistill.data import Data
from undistill.data.batches import Batch
from undistill.models import Model
from undistill.training import loop as loop_module
from undistill.training.fit import Fit
from undistill.training.recipe import Recipe


@pytest.mark.parametrize("schedule", ["step", "cosine", "one_cycle"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_stopped_run_ends_with_the_same_bits(
    toy: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, optimiser: str
) -> None:
    recipe = Recipe(epochs=6, batch_size=16, schedule=schedule, optimiser=optimiser, ema=0.9, selection="best")
    monkeypatch.setattr(loop_module, "CHECKPOINT_SECONDS", 0.0)
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
