"""The README's commands and code run on a small folder of images and a small network, audits for few epochs."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import undistill
from tests.conftest import toy_arrays
from tests.test_data import save_folder
from undistill import Run
from undistill.attacks import Attack
from undistill.cli import app
from undistill.papers import scales
from undistill.training.recipe import Recipe

README = (Path(__file__).parents[1] / "README.md").read_text()
NET = """
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.ReLU(), nn.Linear(24, num_classes))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """photos, net.py, net.safetensors and match.py, where the README expects them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Attack, "registry", dict(Attack.registry))
    monkeypatch.setattr("webbrowser.open", lambda address: address)
    save_folder(tmp_path / "photos", toy_arrays(per_class=18))
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(0)  # some seeds are never right, and have no accuracy of which a price could be paid
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.ReLU(), nn.Linear(24, 3))
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    (code,) = [block for block in blocks("python") if block.startswith("# match.py")]
    (tmp_path / "match.py").write_text(code)
    return tmp_path


def in_haste(words: list[str]) -> list[str]:
    """An audit with four epochs for every student, and one student of each kind; other commands as they stand."""
    audits = words[0] in ("audit", "compare")
    return [words[0], "--seeds", "1", *words[1:], "--set", "recipe.epochs=4"] if audits else words


def hurried(setting: scales.Setting) -> scales.Setting:
    """The same with one epoch for every training."""
    short = Recipe(epochs=1)
    students = {name: replace(student, recipe=short) for name, student in setting.students.items()}
    return replace(setting, recipe=short, students=students)


def test_console_blocks_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "_SMOKE", hurried(scales._SMOKE))
    commands = [line for block in blocks("console") for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) >= 5
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "undistill"
        result = CliRunner().invoke(app, in_haste(words))
        assert result.exit_code == 0, (command, result.stderr)
    assert "SquaredError" in (world / "runs" / "audit" / "report.md").read_text()
    adopted, nasty = Run.open("runs/honest"), Run.open("runs/nasty")
    assert adopted.record["epochs"] == 0
    assert nasty.record["price"] == 0.5
    assert (world / "runs" / "compare" / "comparison.html").exists()


def test_python_block_runs(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if block.startswith("import undistill")]
    exec(compile(hasty(code), "README.md", "exec"), {})
    assert "On photos, the best thief of" in capsys.readouterr().out
    assert torch.is_grad_enabled()


def test_a_network_that_is_trained_already(world: Path) -> None:
    (code,) = [block for block in blocks("python") if block.startswith("mine = ")]
    arrays = toy_arrays(per_class=18)
    torch.manual_seed(0)
    images, labels = np.repeat(arrays["images"][:, None], 3, axis=1), arrays["labels"]
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 24), nn.ReLU(), nn.Linear(24, 3))
    dataset = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    known = {"undistill": undistill, "network": network, "dataset": dataset, "unseen": (255 - images, labels)}
    exec(compile(hasty(code), "README.md", "exec"), known)
    assert known["report"].pairs[0].unseen


def hasty(code: str) -> str:
    """Python that audits, with four epochs for every student."""
    return re.sub(r"(undistill\.audit\(.*)\)", r"\1, recipe=undistill.Recipe(epochs=4))", code)


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (root / target).exists(), target
