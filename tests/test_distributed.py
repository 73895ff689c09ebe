"""Two processes that torchrun started train the network that one would have trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import FAST, NASTY, TEACHER, toy_arrays
from tests.test_kill import DEVICE, finish
from undistill.core import distributed
from undistill.core.distributed import GlobalBatchNorm
from undistill.core.errors import LaunchError, SpecError
from undistill.data import Data
from undistill.models import Model
from undistill.runs.run import Run
from undistill.training.compute import pick_device
from undistill.training.fit import Fit
from undistill.training.recipe import Recipe

SET = [f"--set={setting}" for setting in FAST]
CLOSE = (
    2e-3  # largest difference of a weight, relative to the largest weight of its tensor: rounding, grown in training
)
OTHERS = {
    "price": ["--price", "2"],
    "cmim": ["--defence", "CMIM()"],
    "mad": ["--defence", "MildlyNasty()", "--defence", "MAD()"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


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


PROGRAM = """
import json, os, traceback
from pathlib import Path
import torch
from typer.testing import CliRunner
from undistill.cli import app
from undistill.core.distributed import group
from undistill.training import answers

def refuse(path, write):
    raise OSError(28, "No space left on device", str(path))

rank, world, write = os.environ["RANK"], Path.cwd(), answers.write_atomically
said = []
with group(torch.device("cpu")):
    for place, full, words in json.loads(Path("commands.json").read_text()):
        os.chdir(world / place.format(rank=rank))
        answers.write_atomically = refuse if full else write
        done = CliRunner().invoke(app, words)
        crash = "" if done.exit_code in (0, 2) else "".join(traceback.format_exception(done.exception))
        said.append([done.exit_code, done.stdout, done.stderr + crash])
        os.chdir(world)
Path(f"said-{rank}.json").write_text(json.dumps(said))
"""
"""Commands one after another in the same processes and one group: to start them takes longer than to train a toy. Each
command opens a group of its own where there is none, as the test below that starts one by itself shows."""


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


class World:
    """A folder, and what each of two processes said to the commands that they carried out there."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names
        self.said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]

    def codes(self, name: str) -> list[int]:
        return [said[self.names.index(name)][0] for said in self.said]

    def stdout(self, name: str) -> str:
        return "".join(said[self.names.index(name)][1] for said in self.said)

    def stderr(self, name: str) -> str:
        return "".join(said[self.names.index(name)][2] for said in self.said)


@pytest.fixture(scope="module")
def world(toy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Honest and nasty, each made by one process and by two; and what two processes must refuse."""
    folder = tmp_path_factory.mktemp("torchrun")
    for rank in range(2):
        (folder / str(rank)).mkdir()
        np.savez(folder / str(rank) / "toy.npz", **toy_arrays(seed=rank))
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").touch()
    train = ["train", "--data", str(toy_file), "--model", TEACHER, *SET, *DEVICE, "--out"]
    mine = ["--model", "net.py:make"]
    train_odd = ["train", "--data", str(toy_file), *mine, *SET, *DEVICE, "--out"]
    protect = ["protect", "one", "--defence", NASTY, *DEVICE, "--out"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        finish(*train, "one")
        finish(*protect, "one-nasty")
        for name, asked in OTHERS.items():
            finish("protect", "one", *asked, *DEVICE, "--out", f"one-{name}")
    other = shutil.copytree(folder / "one", folder / "other")
    shutil.rmtree(other / "answers", ignore_errors=True)
    commands = {  # the folder in which, whether the disk is full, the words
        "honest": (".", False, [*train, "two"]),
        "nasty": (".", False, [*protect, "two-nasty"]),
        **{name: (".", False, ["protect", "one", *asked, *DEVICE, "--out", name]) for name, asked in OTHERS.items()},
        "odd": (".", False, [*train_odd, "odd"]),
        "odd nasty": (".", False, ["protect", "odd", *mine, "--defence", NASTY, *DEVICE, "--out", "odd-nasty"]),
        "full": (".", True, ["protect", "other", "--defence", NASTY, "--set", "seed=0", *DEVICE, "--out", "full"]),
        "taken": (".", False, [*train, "taken"]),
        "not shared": ("{rank}", False, [*train, "mine"]),
        "unequal": ("{rank}", False, [*train, str(folder / "un"), "--data", "toy.npz"]),
        "demo": (".", False, ["demo"]),
        "audit": (".", False, ["audit", "two-nasty"]),
    }
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    (folder / "main.py").write_text(PROGRAM)
    (folder / "net.py").write_text(ODD)
    done = run(*TORCHRUN, "main.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return World(folder, list(commands))


@pytest.mark.parametrize("suffix", ["", "-nasty"], ids=["honest", "nasty"])
def test_two_processes_equal_one_to_rounding(world: World, suffix: str) -> None:
    """Weights and batch-norm statistics alike: every image was seen once, in batches of the same size."""
    name = "nasty" if suffix else "honest"
    assert world.codes(name) == [0, 0], world.stderr(name)
    assert world.stdout(name).count("validation accuracy") == 1, "one process speaks"
    folders = [world.folder / f"{number}{suffix}" for number in ("one", "two")]
    assert_close(*folders)
    one, two = (Run.open(folder).record for folder in folders)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"] == pytest.approx(two["metrics"], abs=0.01)
    lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 7)), "one process writes"


@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_protect_as_one_does(world: World, name: str) -> None:
    """A price is searched, class means are taken over all processes, and a surrogate is trained."""
    assert world.codes(name) == [0, 0], world.stderr(name)
    folders = [world.folder / f"one-{name}", world.folder / name]
    assert_close(*folders)
    one, two = (Run.open(folder).record for folder in folders)
    assert one["found"] == pytest.approx(two["found"], rel=0.05)


def test_a_full_disk_ends_the_remembering_of_all(world: World) -> None:
    """Only one process writes; the others must learn of it, or they wait for answers that nobody sends."""
    assert world.codes("full") == [0, 0], world.stderr("full")
    assert world.stderr("full").count("No space left on device") == 1
    assert_close(world.folder / "full", world.folder / "two-nasty")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("taken", "holds files that are no run of undistill"),
        ("not shared", "is not one folder for all processes"),
        ("unequal", "Process 1 has another data_sha256 than process 0"),
        ("demo", "torchrun is for train and protect"),
        ("audit", "torchrun is for train and protect"),
    ],
)
def test_what_one_process_finds_all_say_in_a_sentence(world: World, name: str, said: str) -> None:
    assert world.codes(name) == [2, 2]
    assert world.stderr(name).count(said) == 2
    assert [line.split(":")[0] for line in world.stderr(name).splitlines()] == ["Error", "Error in process 1"]
    assert not (world.folder / "un").exists()


def test_parts_that_are_shared_or_unused_train_as_in_one_process(
    world: World, toy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("odd", "odd nasty"):
        assert world.codes(name) == [0, 0], world.stderr(name)
    monkeypatch.chdir(world.folder)
    words = ["train", "--data", toy_file, "--model", "net.py:make", *SET, *DEVICE, "--out"]
    by_itself = run(*TORCHRUN, "-m", "undistill", *words, "odd-by-itself", cwd=world.folder)
    assert by_itself.returncode == 0, by_itself.stderr
    finish(*words, "odd-one")
    for together in ("odd-by-itself", "odd"):
        assert_close(world.folder / "odd-one", world.folder / together)
    assert Run.open(world.folder / "odd-nasty").record["processes"] == 2


def test_more_processes_than_images_in_a_batch_are_refused(toy: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)
    network = Model.parse(TEACHER).build(toy.shape, toy.num_classes, 0)
    with pytest.raises(SpecError, match="3 processes cannot share batches of 2 images"):
        Fit(Recipe(batch_size=2), 0, torch.device("cpu"))(network, toy, lambda network, batch: {})


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"started 2 processes.*has 1 GPU.*--nproc-per-node=1.*--device cpu"):
        pick_device("cuda")


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
