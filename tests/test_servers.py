"""Servers that this project did not write, each in an environment of its own: `make test-servers`."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import RECIPE, STUDENT
from tests.test_wheel import run
from undistill.api import audit, export, protect, train
from undistill.data.views import to_float
from undistill.runs.contact import Contact
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.training.recipe import Recipe
from undistill.victims.victim import NetworkVictim

pytestmark = pytest.mark.servers

MODEL = """{"name": "digits", "implementation": "protected.Protected",
 "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
 "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]}"""
RECIPES = (Path(__file__).parents[1] / "docs" / "shipping.md").read_text()


def recipe(kind: str) -> str:
    """A block of the page on shipping, such as 'python litserve'."""
    return RECIPES.split(f"```{kind}\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    settings = TrainSettings(recipe=Recipe(epochs=5, lr=0.1))
    honest = train("digits", "ConvNet(width=8)", folder / "honest", settings=settings, device="cpu")
    return protect(honest, "Sealed(levels=2)", folder / "sealed", device="cpu")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def environment(folder: Path, package: str, sealed: Run) -> Path:
    """The bin folder of a new environment with that package; beside it the exported folder that the recipes load."""
    export(sealed, folder / "export", format="onnx")
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    done = run(folder / "venv" / "bin" / "pip", "install", package, "onnxruntime", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "venv" / "bin"


def started(words: list[object], folder: Path, ready: str) -> subprocess.Popen[bytes]:
    """The server, once `ready` answers."""
    process = subprocess.Popen(list(map(str, words)), cwd=folder)
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(ready, timeout=1)
        except OSError:
            time.sleep(0.25)
        else:
            return process
    process.kill()
    raise AssertionError(f"{ready} does not answer")


@pytest.fixture(scope="module")
def litserve(sealed: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("litserve")
    bin_folder = environment(folder, "litserve==0.2.*", sealed)
    (folder / "server.py").write_text(recipe("python litserve"))
    (folder / "api.yaml").write_text(recipe("yaml litserve"))
    (port,) = free_ports(1)
    process = started([bin_folder / "python", "server.py", port], folder, f"http://127.0.0.1:{port}/health")
    yield f"Http('http://127.0.0.1:{port}/predict', protocol='json', shape='{folder / 'api.yaml'}')"
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def mlserver(sealed: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlserver")
    bin_folder = environment(folder, "mlserver==1.7.*", sealed)
    http, grpc, metrics = free_ports(3)
    (folder / "protected.py").write_text(recipe("python mlserver"))
    (folder / "model-settings.json").write_text(MODEL)
    (folder / "settings.json").write_text(
        json.dumps(
            {"http_port": http, "grpc_port": grpc, "metrics_port": metrics, "host": "127.0.0.1", "parallel_workers": 0}
        )
    )
    ready = f"http://127.0.0.1:{http}/v2/models/digits/ready"
    process = started([bin_folder / "mlserver", "start", "."], folder, ready)
    yield f"Http('http://127.0.0.1:{http}', model='digits')"
    process.terminate()
    process.wait(20)


@pytest.mark.parametrize("name", ["litserve", "mlserver"])
def test_a_strangers_server_is_audited_end_to_end(
    name: str, sealed: Run, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    box = request.getfixturevalue(name)
    hasty = RECIPE.model_copy(update={"epochs": 2, "batch_size": 64})
    report = audit(box, tmp_path / "a", data="digits", students=[STUDENT], seeds=1, recipe=hasty, device="cpu")
    reached = report.pairs[0].reached
    assert reached
    assert (reached.output, reached.form, reached.lost) == ("probabilities", "full", 0)
    assert reached.bought > 1000
    images = to_float(sealed.data().test.pixels)
    served = Contact.make(box, "digits", tmp_path / "bought").victim().answer(images)
    assert torch.allclose(served.log_p, NetworkVictim.of(sealed.network()).answer(images).log_p, atol=1e-4)
