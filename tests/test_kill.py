"""kill -9 in the middle: the same command completes the work, with the same bits as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import TEACHER
from undistill.cli import app
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings, TrainSettings
from undistill.runs.train import train
from undistill.training.recipe import Recipe

RECIPE = Recipe(epochs=20, batch_size=8)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# A checkpoint after every epoch, so that a kill lands between two of them.
PROGRAM = "from undistill.training import loop; loop.CHECKPOINT_SECONDS = 0.0; from undistill.cli import app; app()"


def start(*words: object, stderr: int = subprocess.DEVNULL, session: bool = False) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=session
    )


def wait_for(process: subprocess.Popen[bytes], folder: Path, pattern: str) -> None:
    """Wait until a file is there, as long as the process works on it: a busy machine is slow."""
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "it ended too early"
        time.sleep(0.01)


def kill_when(
    process: subprocess.Popen[bytes], folder: Path, pattern: str, number: signal.Signals = signal.SIGKILL
) -> int:
    """Send a signal as soon as a file is there; returns the exit code."""
    wait_for(process, folder, pattern)
    process.send_signal(number)
    return process.wait()


def finish(*words: object) -> None:
    """In this process, which is another one than that which was killed."""
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.stderr


DEVICE = ["--device", "cpu"]
SET = [f"--set=recipe.{field}" for field in (f"epochs={RECIPE.epochs}", f"batch_size={RECIPE.batch_size}")]


@pytest.fixture(scope="module")
def pair(toy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Honest teacher and victim, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    honest = train(str(toy_file), TEACHER, out / "honest", settings=TrainSettings(recipe=RECIPE), device="cpu")
    return honest, protect(honest, "Nasty", out / "nasty", settings=Settings(recipe=RECIPE), device="cpu")


def test_train(pair: tuple[Run, Run], toy_file: Path, tmp_path: Path) -> None:
    words = ["train", "--data", toy_file, "--model", TEACHER, "--out", tmp_path / "run", *SET, *DEVICE]
    assert kill_when(start(*words), tmp_path / "run", "checkpoint-0.pt") == -signal.SIGKILL
    assert not (tmp_path / "run" / "run.json").exists()
    finish(*words)
    assert Run.open(tmp_path / "run").digest == pair[0].digest


ENDINGS = {signal.SIGTERM: (143, "Terminated"), signal.SIGINT: (130, "Interrupted")}


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_protect_ends_at_a_signal_in_a_sentence_and_goes_on(
    number: signal.Signals, pair: tuple[Run, Run], tmp_path: Path
) -> None:
    words = ["protect", pair[0].folder, "--defence", "Nasty", "--out", tmp_path / "run", *DEVICE]
    process = start(*words, stderr=subprocess.PIPE)
    code, said = ENDINGS[number]
    assert kill_when(process, tmp_path / "run", "checkpoint-0.pt", number) == code
    assert process.stderr is not None
    *_, last = process.stderr.read().decode().strip().splitlines()
    assert last == f"Error: {said}. The same command goes on from here."
    assert (tmp_path / "run" / "checkpoint-0.pt").exists()
    finish(*words)
    assert Run.open(tmp_path / "run").digest == pair[1].digest
