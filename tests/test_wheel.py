"""The wheel, installed into an empty environment outside the checkout: what a user gets who has none of our tools."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bare
ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # a copy: builds leave files behind, which the next build would take for sources
    shutil.copytree(ROOT / "undistill", tree / "undistill", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, tree, cwd=folder)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it needs by itself."""
    folder = tmp_path_factory.mktemp("bare")
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    pip = folder / "venv" / "bin" / "pip"
    done = run(pip, "install", "--constraint", CONSTRAINTS, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_demo_ends_with_a_report(bare: Path) -> None:
    done = run(bare / "venv" / "bin" / "undistill", "demo", cwd=bare)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert list((bare / "runs").rglob("report.html"))


def test_what_needs_an_extra_says_which(bare: Path) -> None:
    """As a user would meet it: no tool of ours happens to be there."""
    undistill = bare / "venv" / "bin" / "undistill"
    done = run(undistill, "train", "--data", "digits", "--model", "timm:resnet18", "--out", "runs/timm", cwd=bare)
    assert done.returncode == 2
    assert "pip install 'undistill[timm]'" in done.stderr
    done = run(bare / "venv" / "bin" / "python", "-c", "import ray", cwd=bare)
    assert "No module named 'ray'" in done.stderr


@pytest.mark.parametrize("extra", ["ray", "timm", "dev"])
def test_extras_resolve(extra: str, wheel: Path, bare: Path) -> None:
    pip = bare / "venv" / "bin" / "pip"
    done = run(pip, "install", "--dry-run", "--constraint", CONSTRAINTS, f"{wheel}[{extra}]", cwd=bare)
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr


@pytest.mark.parametrize(("runtime", "needs"), [("torch", ["torch"]), ("onnx", ["onnxruntime", "numpy"])])
def test_an_exported_folder_runs_with_its_runtime_alone(runtime: str, needs: list[str], tmp_path: Path) -> None:
    """In an environment of its own, in which there is nothing else."""
    ours = [sys.executable, "-m", "undistill"]
    words = ["--data", "digits", "--model", "ConvNet(width=4)", "--set", "recipe.epochs=1", "--out", tmp_path / "run"]
    assert run(*ours, "train", *words, cwd=ROOT).returncode == 0
    assert (
        run(*ours, "protect", tmp_path / "run", "--defence", "Sealed()", "--out", tmp_path / "s", cwd=ROOT).returncode
        == 0
    )
    done = run(*ours, "export", tmp_path / "s", "--to", tmp_path / "e", "--format", runtime, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path).returncode == 0
    pip, python = tmp_path / "venv" / "bin" / "pip", tmp_path / "venv" / "bin" / "python"
    assert run(pip, "install", "--constraint", CONSTRAINTS, *needs, cwd=tmp_path).returncode == 0
    blank = {
        "torch": "import torch; images = torch.rand(3, 1, 8, 8)",
        "onnx": "import numpy; images = numpy.random.rand(3, 1, 8, 8).astype('float32')",
    }[runtime]
    script = f"{blank}; import model; (p,) = model.load()(images); print(tuple(p.shape), round(float(p.sum()), 4))"
    done = run(python, "-c", script, cwd=tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(3, 10) 3.0")
