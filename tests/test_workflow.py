from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import NASTY, RECIPE, TEACHER
from undistill.core.errors import ModelError, NonFinite, StoreError
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings, TrainSettings, needed_epochs, recorded_settings
from undistill.runs.train import train
from undistill.training.recipe import Recipe

SETTINGS = TrainSettings(recipe=RECIPE)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "weights.safetensors")


@pytest.mark.parametrize(("images", "epochs"), [(30, 160), (300, 60), (1000, 20), (4000, 20), (50_000, 11), (None, 40)])
def test_adopted_weights_are_imitated_for_as_many_steps_as_are_needed(images: int | None, epochs: int) -> None:
    assert needed_epochs(images, 64) == epochs


def test_label_smoothing_and_seed_change_the_run(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    digests = {honest.digest}
    for name, change in {"smooth": {"label_smoothing": 0.3}, "seed": {"seed": 1}}.items():
        settings = TrainSettings(recipe=RECIPE, **change)
        digests.add(train(str(toy_file), TEACHER, tmp_path / name, settings=settings, device="cpu").digest)
    assert len(digests) == 3


def test_existing_weights_are_taken_as_they_are(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    adopt = TrainSettings(recipe=Recipe(epochs=0))
    file = honest.folder / "weights.safetensors"
    run = train(str(toy_file), TEACHER, tmp_path / "adopted", weights=file, settings=adopt, device="cpu")
    assert all(torch.equal(value, weights(honest)[name]) for name, value in weights(run).items())
    assert run.record["metrics"]["validation_accuracy"] == honest.record["metrics"]["validation_accuracy"]
    images = run.record["train_images"]
    assert recorded_settings(run).recipe.epochs == needed_epochs(images, 64), "or protect and audit would train nothing"


def test_weights_of_another_network_leave_nothing_behind(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    file = honest.folder / "weights.safetensors"
    with pytest.raises(ModelError, match="another architecture"):
        train(str(toy_file), "ConvNet(width=5)", tmp_path / "run", weights=file, settings=SETTINGS)
    assert not (tmp_path / "run").exists()


def test_victim_is_accurate_and_different(honest: Run, victim: Run) -> None:
    assert victim.record["metrics"]["validation_accuracy"] > 0.9
    assert victim.record["metrics"]["divergence"] > 1
    assert victim.record["parent"]["weights_sha256"] == honest.digest
    assert recorded_settings(victim) == recorded_settings(honest)


def test_divergence_grows_with_omega(honest: Run, tmp_path: Path) -> None:
    reached = [
        protect(honest, f"Nasty(omega={omega})", tmp_path / str(omega), device="cpu").record["metrics"]["divergence"]
        for omega in (0.0, 0.05, 0.2)
    ]
    assert reached == sorted(reached)
    assert reached[2] > 5 * reached[0]


def test_warm_start_takes_its_share_of_the_epochs(honest: Run, tmp_path: Path) -> None:
    run = protect(honest, "Nasty(omega=0.1, warm_start=0.5)", tmp_path / "warm", device="cpu")
    assert run.record["epochs"] == RECIPE.epochs / 2


def test_another_adversary_by_its_run(honest: Run, victim: Run, tmp_path: Path, toy_file: Path) -> None:
    run = protect(honest, f"Nasty(omega=0.1, adversary={str(victim.folder)!r})", tmp_path / "other", device="cpu")
    assert run.digest != victim.digest
    assert run.record["refers"] == {str(victim.folder): victim.digest}
    with pytest.raises(StoreError, match="There is no run folder nowhere"):
        protect(honest, "Nasty(adversary='nowhere')", tmp_path / "nowhere", device="cpu")
    digits = train("digits", TEACHER, tmp_path / "digits", settings=TrainSettings(recipe=Recipe(epochs=0)))
    with pytest.raises(StoreError, match="10 classes"):
        protect(honest, f"Nasty(adversary={str(digits.folder)!r})", tmp_path / "wrong", device="cpu")


def test_a_diverged_protection_stops_with_advice_and_keeps_nothing(honest: Run, tmp_path: Path) -> None:
    """Unclipped, at an absurd rate, the undermined network leaves the finite numbers."""
    recipe = Recipe(**(RECIPE.model_dump() | {"lr": 100, "clip": 0, "epochs": 20}))
    with pytest.raises(NonFinite, match=r"Lower recipe\.lr"):
        protect(honest, "Nasty(omega=1000)", tmp_path / "run", settings=Settings(recipe=recipe), device="cpu")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    mended = protect(honest, NASTY, tmp_path / "run", settings=Settings(recipe=RECIPE), device="cpu")
    assert mended.record["metrics"]["validation_accuracy"] > 0.9, "the folder is free for another recipe"


NET = """
from torch import nn

def make(num_classes, in_channels, image_size):
    height, width = image_size
    inputs = in_channels * height * width
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, num_classes))
"""


def test_stored_runs_do_not_execute_code_unless_it_is_named_again(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from undistill.core import code

    (tmp_path / "net.py").write_text(NET)
    mine = f"{tmp_path / 'net.py'}:make"
    run = train(str(toy_file), mine, tmp_path / "mine", settings=SETTINGS, device="cpu")
    monkeypatch.setattr(code, "_trusted", set())
    with pytest.raises(ModelError, match="name it yourself: --model"):
        protect(Run.open(run.folder), NASTY, tmp_path / "victim", device="cpu")
    assert not (tmp_path / "victim").exists()
    protect(run.folder, NASTY, tmp_path / "victim", model=mine, device="cpu")


def test_changed_code_is_another_run(toy_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(NET)
    train(str(toy_file), f"{file}:make", tmp_path / "run", settings=SETTINGS, device="cpu")
    file.write_text(NET.replace("32", "16"))
    with pytest.raises(StoreError, match=r"holds another run \(refers"):
        train(str(toy_file), f"{file}:make", tmp_path / "run", settings=SETTINGS, device="cpu")


def test_frozen_networks_can_be_adopted_but_not_trained(toy_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        NET + "\ndef still(num_classes, in_channels, image_size):\n"
        "    return make(num_classes, in_channels, image_size).requires_grad_(False)\n"
    )
    adopt = TrainSettings(recipe=Recipe(epochs=0))
    assert train(str(toy_file), f"{file}:still", tmp_path / "kept", settings=adopt, device="cpu").network
    with pytest.raises(ModelError, match="no trainable parameter"):
        train(str(toy_file), f"{file}:still", tmp_path / "run", settings=SETTINGS, device="cpu")


def test_protect_refuses_code_that_changed_since_training(toy_file: Path, tmp_path: Path) -> None:
    """The weights would still fit, and mean something else."""
    file = tmp_path / "net.py"
    file.write_text(NET)
    run = train(str(toy_file), f"{file}:make", tmp_path / "run", settings=SETTINGS, device="cpu")
    file.write_text(NET.replace("nn.ReLU()", "nn.Tanh()"))
    with pytest.raises(StoreError, match="has changed since"):
        protect(run, NASTY, tmp_path / "victim", model=f"{file}:make", device="cpu")
