"""Servers that this project did not write, each in an environment of its own: `make test-servers`."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import RECIPE, STUDENT
from tests.test_wheel import run
from undistill.api import audit
from undistill.data import Digits
from undistill.data.views import to_float

pytestmark = pytest.mark.servers

LITSERVE = """
import sys
import litserve
import numpy


class Api(litserve.LitAPI):
    def setup(self, device):
        self.weights = numpy.load("weights.npy")

    def decode_request(self, request):
        return numpy.asarray(request["image"], numpy.float32).ravel()

    def predict(self, image):
        z = numpy.append(image, 1) @ self.weights
        p = numpy.exp(z - z.max())
        return p / p.sum()

    def encode_response(self, p):
        return {"scores": p.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
"""
MLSERVER = """
import numpy
from mlserver import MLModel, types
from mlserver.codecs import NumpyCodec


class Linear(MLModel):
    async def load(self):
        self.weights = numpy.load("weights.npy")
        return True

    async def predict(self, payload):
        images = NumpyCodec.decode_input(payload.inputs[0])
        images = images.reshape(len(images), -1)
        z = numpy.concatenate([images, numpy.ones((len(images), 1))], 1) @ self.weights
        p = numpy.exp(z - z.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True)).astype(numpy.float32)
        return types.InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("probabilities", p)]
        )
"""
MODEL = """{"name": "digits", "implementation": "linear.Linear",
 "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
 "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]}"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def environment(folder: Path, package: str) -> Path:
    """The bin folder of a new environment with that package; beside it the weights of a linear classifier."""
    data = Digits().load()
    images = to_float(data.train.pixels).flatten(1).numpy()
    images = np.concatenate([images, np.ones((len(images), 1), np.float32)], 1)
    targets = 10 * np.eye(10)[data.train.labels.numpy()]
    np.save(folder / "weights.npy", np.linalg.solve(images.T @ images + np.eye(65), images.T @ targets))
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    done = run(folder / "venv" / "bin" / "pip", "install", package, "numpy", cwd=folder)
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
def litserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("litserve")
    bin_folder = environment(folder, "litserve==0.2.*")
    (folder / "server.py").write_text(LITSERVE)
    (folder / "api.yaml").write_text("request: {image: $image}\nanswer: scores\n")
    (port,) = free_ports(1)
    process = started([bin_folder / "python", "server.py", port], folder, f"http://127.0.0.1:{port}/health")
    yield f"Http('http://127.0.0.1:{port}/predict', protocol='json', shape='{folder / 'api.yaml'}')"
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlserver")
    bin_folder = environment(folder, "mlserver==1.7.*")
    http, grpc, metrics = free_ports(3)
    (folder / "linear.py").write_text(MLSERVER)
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
def test_a_strangers_server_is_audited_end_to_end(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    box = request.getfixturevalue(name)
    recipe = RECIPE.model_copy(update={"epochs": 2, "batch_size": 64})
    report = audit(box, tmp_path / "a", data="digits", students=[STUDENT], seeds=1, recipe=recipe, device="cpu")
    assert report.victim.accuracy > 0.9
    reached = report.pairs[0].reached
    assert reached
    assert (reached.output, reached.form, reached.lost) == ("probabilities", "full", 0)
    assert reached.bought > 1000
