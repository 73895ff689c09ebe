"""Servers as black boxes: four protocols, each against a server of a few lines; and what servers do wrong."""

import base64
import io
import json
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import RECIPE, STUDENT
from undistill.api import audit
from undistill.core.errors import SpecError, UndistillError, VictimError
from undistill.data.views import to_float
from undistill.runs.contact import Contact
from undistill.runs.run import Run
from undistill.victims import http
from undistill.victims.answer import Form
from undistill.victims.http import Http
from undistill.victims.protocols import HEADER, png, rows

pytest.importorskip("httpx2")


class Server(ThreadingHTTPServer):
    """Answers with the network of a run, in four protocols; `fault` may change or replace any answer."""

    daemon_threads = True

    def __init__(self, run: Run) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.run, self.network = run, run.network()
        self.asked: list[int] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.fault: Callable[[int], tuple[int, bytes, dict[str, str]] | None] = lambda number: None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answers(self, images: Tensor) -> np.ndarray:
        with self.lock:
            self.asked.append(len(images))
        with torch.no_grad():
            return self.network(images).softmax(1).numpy()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v2":
            return self.send(200, b'{"name": "server", "extensions": ["binary_tensor_data"]}')
        about = {
            "name": "model",
            "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 12, 12]}],
            "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}],
        }
        if self.path == "/v2/models/encoded":
            about["inputs"] = [{"name": "file", "datatype": "BYTES", "shape": [-1]}]
        return self.send(200 if "/v2/models/" in self.path else 404, json.dumps(about).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.server.paths.append(self.path)
            number = len(self.server.headers)
        if found := self.server.fault(number):
            if found[0] == 0:
                self.close_connection = True
                return
            self.send(*found)
            return
        try:
            self.send(200, *self.answer(body))
        except Exception as error:
            self.send(400, json.dumps({"error": repr(error)}).encode())

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, body: bytes) -> tuple[bytes, dict[str, str]]:
        if self.path.startswith("/v2/"):
            return self.inference(body)
        asked = json.loads(body)
        if self.path == "/v1/models/model:predict":
            images = torch.tensor(asked["instances"]).permute(0, 3, 1, 2)
            return json.dumps({"predictions": self.server.answers(images).tolist()}).encode(), {}
        if self.path == "/classify":
            p = self.server.answers(decoded(base64.b64decode(asked["inputs"])))[0]
            ranked = sorted(zip(p.tolist(), ("0", "1", "2"), strict=True), reverse=True)
            found = [{"label": name, "score": score} for score, name in ranked][: asked["parameters"]["top_k"]]
            return json.dumps(found).encode(), {}
        images = torch.cat([decoded(base64.b64decode(one["png"])) for one in asked["batch"]["files"]])
        scored = [{"0": float(a), "1": float(b), "2": float(c)} for a, b, c in self.server.answers(images)]
        return json.dumps({"result": {"scores": scored}}).encode(), {}

    def inference(self, body: bytes) -> tuple[bytes, dict[str, str]]:
        end = int(self.headers.get(HEADER, len(body)))
        asked = json.loads(body[:end])
        tensor = asked["inputs"][0]
        if tensor["datatype"] == "BYTES":
            images, rest = [], body[end:]
            while rest:
                (size,) = struct.unpack("<I", rest[:4])
                images.append(decoded(rest[4 : 4 + size]))
                rest = rest[4 + size :]
            batch = torch.cat(images)
        elif "data" in tensor:
            batch = torch.tensor(tensor["data"], dtype=torch.float32).reshape(tensor["shape"])
        else:
            batch = torch.frombuffer(bytearray(body[end:]), dtype=torch.float32).reshape(tensor["shape"])
        p = self.server.answers(batch)
        output = {"name": "probabilities", "datatype": "FP32", "shape": list(p.shape)}
        if (asked.get("parameters") or {}).get("binary_data_output"):
            output["parameters"] = {"binary_data_size": p.nbytes}
            head = json.dumps({"model_name": "model", "outputs": [output]}).encode()
            return head + p.tobytes(), {HEADER: str(len(head))}
        return json.dumps({"outputs": [output | {"data": p.ravel().tolist()}]}).encode(), {}


def decoded(content: bytes) -> Tensor:
    return to_float(torch.from_numpy(np.array(Image.open(io.BytesIO(content))))[None, None])


@pytest.fixture
def server(honest: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "PAUSE", 0.001)
    monkeypatch.delenv("UNDISTILL_TOKEN", raising=False)
    with Server(honest) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


SHAPE = """
request: {batch: {files: [{png: $image}]}}
image: png
answer: result.scores.0
"""
WAYS = {
    "binary": "Http('{url}')",
    "json tensors": "Http('{url}', binary=False)",
    "encoded": "Http('{url}', model='encoded')",
    "kserve": "Http('{url}', protocol='kserve-v1', layout='NHWC')",
    "hugging face": "Http('{url}/classify', protocol='huggingface')",
    "declared": "Http('{url}/own', protocol='json', shape='{shape}')",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_protocol_gives_the_networks_answers(way: str, server: Server, toy_file: Path, tmp_path: Path) -> None:
    (tmp_path / "api.yaml").write_text(SHAPE)
    box = WAYS[way].format(url=server.url, shape=tmp_path / "api.yaml")
    contact = Contact.make(box, str(toy_file), tmp_path / "bought")
    assert contact.known.form == Form.FULL
    images = to_float(server.run.data().test.pixels)
    with torch.no_grad():
        expected = server.network(images).log_softmax(1)
    assert torch.allclose(contact.victim().answer(images).log_p, expected, atol=1e-4)


@pytest.mark.parametrize(("fields", "binary"), [("", True), (", binary=False", False), (", binary=True", True)])
def test_tensors_are_binary_where_the_server_can(
    fields: str, binary: bool, server: Server, toy_file: Path, tmp_path: Path
) -> None:
    Contact.make(f"Http('{server.url}'{fields})", str(toy_file), tmp_path / "bought")
    assert {HEADER.lower() in headers for headers in server.headers} == {binary}


def test_an_audit_of_a_server_counts_as_it_does(server: Server, honest: Run, toy_file: Path, tmp_path: Path) -> None:
    options = {"students": [STUDENT], "seeds": 1, "recipe": RECIPE, "device": "cpu"}
    report = audit(f"Http('{server.url}')", tmp_path / "a", data=str(toy_file), **options)
    alone = audit(honest, tmp_path / "b", honest="none", **options)
    assert [cell.accuracy for cell in report.cells] == [cell.accuracy for cell in alone.cells]
    reached = report.pairs[0].reached
    assert reached
    assert reached.billed == sum(server.asked)
    assert reached.lost == 0


def first(faults: int, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> Any:
    """A fault of the first requests; status 0 breaks the connection off."""
    return lambda number: (status, body, headers or {}) if number <= faults else None


@pytest.mark.parametrize("status", [429, 502, 503, 504, 0])
def test_a_busy_server_is_asked_again(status: int, server: Server, toy_file: Path, tmp_path: Path) -> None:
    server.fault = first(2, status)
    contact = Contact.make(f"Http('{server.url}')", str(toy_file), tmp_path / "bought")
    assert contact.purchases.number("lost") == (2 * 8 if status == 0 else 0)
    assert contact.purchases.billed == sum(server.asked)


def test_a_server_that_stays_down_is_one_sentence_and_the_audit_goes_on(
    server: Server, toy_file: Path, tmp_path: Path
) -> None:
    options = {"students": [STUDENT], "seeds": 1, "recipe": RECIPE, "device": "cpu", "data": str(toy_file)}
    server.fault = lambda number: (503, b"", {}) if number > 12 else None
    with pytest.raises(VictimError, match=r"is busy \(status 503\), 6 times\. What was answered is kept"):
        audit(f"Http('{server.url}', parallel=1)", tmp_path / "a", **options)
    before = sum(server.asked)
    server.fault = lambda number: None
    report = audit(f"Http('{server.url}', parallel=1)", tmp_path / "a", **options)
    reached = report.pairs[0].reached
    assert reached
    assert reached.billed == sum(server.asked) > before
    assert reached.billed == reached.bought + 8 + 8  # asked twice at first, and recognised afterwards


def output(shape: str, data: str) -> tuple[int, bytes, dict[str, str]]:
    """An answer with one output of the Open Inference Protocol."""
    found = f'{{"outputs": [{{"name": "p", "datatype": "FP32", "shape": {shape}, "data": {data}}}]}}'
    return 200, found.encode(), {}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, b"who?", {}), r"refuses access \(status 401\): put a token into UNDISTILL_TOKEN"),
        ((404, b"none", {}), r"is not there \(status 404\)"),
        ((302, b"", {"location": "http://elsewhere/"}), "leads elsewhere .* http://elsewhere/"),
        ((400, b'{"error": "bad shape"}', {}), r"refuses the question .*bad shape"),
        ((200, b"<html>", {}), "what is no JSON: <html>"),
        ((200, b"[" * 100_000, {}), "no JSON"),
        ((200, b"{}", {}), "gave no outputs"),
        ((200, b'{"outputs": [{"name": "p"}]}', {}), "cannot be read"),
        (output("[1, 3]", "[1, 2]"), "cannot be read"),
        (output("[2]", "[NaN, 1]"), "NaN"),
        (output("[8, 2]", str([0.5] * 16)), "answers 2 classes, and the data has 3"),
        ((200, b"{}", {HEADER: "999999999999"}), "gave no outputs"),
    ],
)  # fmt: skip
def test_what_servers_answer_wrongly_is_one_sentence(
    answer: Any, said: str, server: Server, toy_file: Path, tmp_path: Path
) -> None:
    server.fault = lambda number: answer
    with pytest.raises(VictimError, match=said):
        Contact.make(f"Http('{server.url}')", str(toy_file), tmp_path / "bought")


def test_a_server_that_is_not_there(toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAUSE", 0.001)
    with pytest.raises(VictimError, match="cannot be reached"):
        Contact.make("Http('http://127.0.0.1:9')", str(toy_file), tmp_path / "bought")


def test_an_answer_that_never_ends(server: Server, toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(http, "LARGEST", 1000)
    server.fault = lambda number: (200, b" " * 5000, {})
    with pytest.raises(VictimError, match="answered more than"):
        Contact.make(f"Http('{server.url}')", str(toy_file), tmp_path / "bought")


def test_a_token_is_sent_and_never_written(server: Server, toy_file: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("UNDISTILL_TOKEN", "s3cret-token")
    Contact.make(f"Http('{server.url}')", str(toy_file), tmp_path / "bought")
    assert {headers["authorization"] for headers in server.headers} == {"Bearer s3cret-token"}
    server.fault = lambda number: (403, b"no s3cret-token here", {})
    with pytest.raises(VictimError) as refused:
        Contact.make(f"Http('{server.url}', header='X-Key')", str(toy_file), tmp_path / "other")
    assert server.headers[-1]["x-key"] == "s3cret-token"
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for text in (*files, str(refused.value).encode(), caplog.text.encode()):
        assert b"s3cret-token" not in text


def test_a_token_that_is_none_is_not_shown(server: Server, toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("UNDISTILL_TOKEN", "s3cret-token\n")
    Contact.make(f"Http('{server.url}')", str(toy_file), tmp_path / "bought")
    assert server.headers[-1]["authorization"] == "Bearer s3cret-token"
    for wrong in ("s3cret\ttoken", "s3cret-tökén"):
        monkeypatch.setenv("UNDISTILL_TOKEN", wrong)
        with pytest.raises(VictimError, match="holds what no header can") as refused:
            Contact.make(f"Http('{server.url}')", str(toy_file), tmp_path / "other")
        assert "s3cret" not in str(refused.value)


def test_a_finished_audit_needs_no_server(server: Server, toy_file: Path, tmp_path: Path) -> None:
    options = {"students": [STUDENT], "seeds": 1, "recipe": RECIPE, "device": "cpu", "data": str(toy_file)}
    report = audit(f"Http('{server.url}')", tmp_path / "a", **options)
    server.fault = lambda number: (503, b"", {})
    again = audit(f"Http('{server.url}')", tmp_path / "a", **options)
    assert again.pairs == report.pairs


def test_a_server_may_have_names_of_its_own(server: Server, toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Contact, "_look", lambda contact: None)  # it would try every order of its classes
    scores = json.dumps([{"label": f"LABEL_{place}", "score": 1 / 3} for place in range(3)])
    server.fault = lambda number: (200, scores.encode(), {})
    with pytest.raises(VictimError, match=r"names the class 'LABEL_0'.*classes='first,second"):
        Contact.make(f"Http('{server.url}/x', protocol='huggingface')", str(toy_file), tmp_path / "a")
    named = ", classes='LABEL_0,LABEL_1,LABEL_2'"
    contact = Contact.make(f"Http('{server.url}/x', protocol='huggingface'{named})", str(toy_file), tmp_path / "b")
    assert contact.known.order == (0, 1, 2)


def test_a_query_of_an_address_stays_at_its_end(server: Server, toy_file: Path, tmp_path: Path) -> None:
    server.fault = lambda number: (418, b"", {})
    with pytest.raises(VictimError, match="status 418"):
        Contact.make(f"Http('{server.url}/api?version=1')", str(toy_file), tmp_path / "a")
    assert server.paths[-1] == "/api/v2/models/model/infer?version=1"


def test_a_token_never_travels_in_the_clear(toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("UNDISTILL_TOKEN", "s3cret-token")
    with pytest.raises(VictimError, match="is not encrypted"):
        Contact.make("Http('http://192.0.2.1')", str(toy_file), tmp_path / "bought")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://me:word@127.0.0.1", "holds a name or password"),
        ("http://127.0.0.1/?api_key=1", "'api_key' would be recorded"),
        ("https://host/x?X-Amz-Signature=1", "would be recorded"),
        ("file:///etc/passwd", "begins with http"),
        ("http://", "begins with http"),
        ("http://host:port", "is no address"),
        ("http://host/#a", "leave it out"),
        ("http://host/?sk-12345", "without a name, which may be a key"),
        ("http://host/a b", "spaces or what cannot be printed"),
    ],
)
def test_addresses_that_are_refused(url: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as refused:
        Http(url=url)
    for secret in ("word@", "sk-12345", "api_key=1"):
        assert secret not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no file"),
        ("request: [", "is no YAML"),
        ("answer: x", "request: Field required"),
        ("request: {a: 1}", "names no place for images"),
        ("request: $images\nmore: 1", "Extra inputs"),
    ],
)
def test_bad_declarations(content: str | None, said: str, server: Server, toy_file: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "api.yaml").write_text(content)
    with pytest.raises(UndistillError, match=said):
        Contact.make(
            f"Http('{server.url}', protocol='json', shape='{tmp_path}/api.yaml')", str(toy_file), tmp_path / "bought"
        )


@pytest.mark.parametrize(
    ("found", "values", "classes"),
    [
        ([[0.1, 0.2, 0.7]], [[0.1, 0.2, 0.7]], None),
        ([2, 0], None, [[2], [0]]),
        (["b", "c"], None, [[1], [2]]),
        ([{"a": 0.1, "b": 0.7, "c": 0.2}], [[0.1, 0.7, 0.2]], None),
        ([[{"label": "c", "score": 0.9}, {"label": "a", "score": 0.05}]], [[0.9, 0.05]], [[2, 0]]),
    ],
)
def test_answers_as_servers_write_them(found: Any, values: Any, classes: Any) -> None:
    read = rows(found, ("a", "b", "c"))
    assert (None if read.values is None else read.values.tolist()) == values
    assert (None if read.classes is None else read.classes.tolist()) == classes


@pytest.mark.parametrize("found", [{}, [], [[]], ["d"], [[0.1], [0.1, 0.2]], [{"a": "x"}], [None], [[{"label": "a"}]]])
def test_answers_that_nobody_can_read(found: Any) -> None:
    with pytest.raises(VictimError):
        rows(found, ("a", "b", "c"))


def test_a_png_has_the_pixels_of_its_image() -> None:
    for channels in (1, 3):
        pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
        read = np.array(Image.open(io.BytesIO(png(to_float(pixels)))))
        assert (read.reshape(5, 7, channels) == pixels.permute(1, 2, 0).numpy()).all()
