"""Two processes that torchrun started train the network that one would have trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from tests.conftest import FAST, NASTY, TEACHER, toy_arrays
from undistill.cli import app
from undistill.core.distributed import GlobalBatchNorm
from undistill.runs.run import Run

SET = [f"--set={setting}" for setting in FAST]
CLOSE = (
    2e-3  # largest difference of a weight, relative to the largest weight of its tensor: rounding, grown in training
)


def torchrun(*words: object, cwd: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "undistill"]
    return run(*launcher, *words, cwd=cwd)


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=cwd, env=environment)


def assert_close(one: Path, two: Path) -> None:
    ours, theirs = load_file(one / "weights.safetensors"), load_file(two / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        largest = value.abs().max().float().clamp_min(1e-3)
        assert ((value - theirs[name]).abs().max() / largest).item() < CLOSE, name


@pytest.fixture(scope="module")
def pair(toy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Honest and nasty, each made by one process and by two."""
    folder = tmp_path_factory.mktemp("torchrun")
    train = ["train", "--data", toy_file, "--model", TEACHER, *SET, "--out"]
    protect = ["protect", "one", "--defence", NASTY, "--out"]
    for words in (train, protect):
        suffix = "" if words is train else "-nasty"
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            alone = CliRunner().invoke(app, [*map(str, words), f"one{suffix}"])
        assert alone.exit_code == 0, alone.stderr
        together = torchrun(*words, f"two{suffix}", cwd=folder)
        assert together.returncode == 0, together.stderr
        assert together.stdout.count("validation accuracy") == 1, "one process speaks"
    return folder


@pytest.mark.parametrize("suffix", ["", "-nasty"], ids=["honest", "nasty"])
def test_two_processes_equal_one_to_rounding(pair: Path, suffix: str) -> None:
    """Weights and batch-norm statistics alike: every image was seen once, in batches of the same size."""
    assert_close(pair / f"one{suffix}", pair / f"two{suffix}")
    one, two = Run.open(pair / f"one{suffix}").record, Run.open(pair / f"two{suffix}").record
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"] == pytest.approx(two["metrics"], abs=0.01)
    lines = [json.loads(line) for line in (pair / f"two{suffix}" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 7)), "one process writes"


def test_unequal_data_is_refused_by_all(tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        np.savez(tmp_path / rank / "toy.npz", **toy_arrays(seed=int(rank)))
    program = (
        "import os, sys; os.chdir(os.environ['RANK']); "
        "from undistill.cli import app; app(['train', '--data', 'toy.npz', '--model', 'ConvNet(width=2)', '--out', "
        f"{str(tmp_path / 'out')!r}])"
    )
    (tmp_path / "main.py").write_text(program)
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "main.py", cwd=tmp_path)
    assert done.returncode
    for process in ("Error: ", "Error in process 1: "):
        assert f"{process}Process 1 has another data_sha256 than process 0" in done.stderr
    assert not (tmp_path / "out").exists()


def script(folder: Path, program: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Two processes that run `program` before the command."""
    command = f"from undistill.cli import app; app({[str(word) for word in words]!r})"
    (folder / "main.py").write_text(f"import os, sys\n{program}\n{command}\n")
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "main.py", cwd=folder)


def test_a_full_disk_ends_the_remembering_of_all(pair: Path) -> None:
    """Only one process writes; the others must learn of it, or they wait for answers that nobody sends."""
    program = (
        "from undistill.training import answers\n"
        "def refuse(path, write): raise OSError(28, 'No space left on device', str(path))\n"
        "answers.write_atomically = refuse"
    )
    command = ["protect", pair / "one", "--defence", NASTY, "--set", "seed=0", "--out", pair / "full"]
    for file in (pair / "one" / "answers").rglob("*.safetensors"):
        file.unlink()
    done = script(pair, program, *command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("No space left on device") == 1
    assert_close(pair / "full", pair / "two-nasty")


def test_out_must_be_free_and_shared(toy_file: Path, tmp_path: Path) -> None:
    """All processes say what the first one finds, in a sentence."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    words = ["train", "--data", toy_file, "--model", TEACHER, *SET, "--out"]
    done = script(tmp_path, "", *words, tmp_path / "out")
    assert done.returncode
    assert done.stderr.count("holds files that are no run of undistill") == 2
    assert "StoreError" not in done.stderr, "no traceback"
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    done = script(tmp_path, "os.chdir(os.environ['RANK'])", *words, "mine")
    assert done.returncode
    assert done.stderr.count("is not one folder for all processes") == 2


ODD = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.body = nn.Sequential(self.first, self.norm, nn.ReLU(), self.second, self.norm)
        self.again = self.norm
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.again(self.body(x)).mean((2, 3)))

def make():
    return Odd()
"""


def test_parts_that_are_shared_or_unused_train_as_in_one_process(toy_file: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(ODD)
    words = ["train", "--data", toy_file, "--model", "net.py:make", *SET[1:], "--set=recipe.epochs=2", "--out"]
    alone, together = run("-m", "undistill", *words, "one", cwd=tmp_path), torchrun(*words, "two", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("command", [["demo"], ["audit", "two-nasty"]], ids=["demo", "audit"])
def test_what_is_not_one_training_is_refused(command: list[str], pair: Path) -> None:
    done = torchrun(*command, cwd=pair)
    assert done.returncode
    assert "torchrun is for train and protect" in done.stderr


def test_more_processes_than_images_in_a_batch_are_refused(toy_file: Path, tmp_path: Path) -> None:
    words = ["train", "--data", toy_file, "--model", TEACHER, "--set=recipe.batch_size=2", "--out", "out"]
    done = torchrun(*words, cwd=tmp_path, processes=3)
    assert done.returncode
    assert "3 processes cannot share batches of 2 images" in done.stderr


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_of_one_process_is_torchs_own(momentum: float | None, training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    whole = GlobalBatchNorm(ours).train(training)
    theirs.train(training)
    for _ in range(3):
        images = 3 * torch.randn(8, 3, 4, 4) + 1
        x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
        outputs = whole(x), theirs(y)
        weights = torch.randn_like(images)
        for output in outputs:
            (output * weights).sum().backward()
        assert torch.allclose(*outputs, atol=1e-5)
        assert torch.allclose(x.grad, y.grad, atol=1e-5)  # type: ignore[arg-type]
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value), name
