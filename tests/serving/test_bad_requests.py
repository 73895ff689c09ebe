"""Two thousand bad questions: each gets a sentence, none a traceback, and no answer leaves without its defence."""

import base64
import io
import json
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.conftest import RECIPE
from tests.serving.server import asked, infer, running
from undistill.api import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.serving.app import Server
from undistill.serving.limits import Limits
from undistill.serving.served import of_run
from undistill.victims.protocols import HEADER

REQUESTS = 2000
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**400, 1.5, 1e308, "", "images", "\0", "../../etc/passwd", "é" * 100, [], {},
    [[]], [None], {"a": []}, [0] * 144, [1e30] * 144, [-0.5] * 144, ["0.5"] * 144, [[0.5] * 12] * 11, [True] * 144,
]  # fmt: skip
PATHS = (
    "/v2/models/../../../etc/passwd", "/v2/models/model/../model/infer", "/%2e%2e/%2e%2e/etc/passwd", "//v2", "/v2/",
    "/v2/models/model%00/infer", "/v2/models/model/versions/../infer", "/predict/", "/PREDICT", "/metrics/x", "/\x7f",
    "/v2/models/" + "a" * 3000, "/v2/models/model/infer?outputs=logits", "*", "http://elsewhere/v2",
)  # fmt: skip
KINDS = (
    "text/plain", "application/xml", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 500, "image/png",
    "application/json; charset=utf-16", "\x00", "application/octet-stream", "video/mp4", "a" * 4000, "",
)  # fmt: skip
HEADERS = (
    (HEADER, "-1"), (HEADER, "1e9"), (HEADER, "99999999999999999999"), (HEADER, "0"), ("content-encoding", "gzip"),
    ("authorization", "Bearer"), ("authorization", "Basic eDp5"), ("x-api-key", "x" * 9000), ("x-long", "y" * 20_000),
    ("expect", "100-continue"), ("te", "trailers"), ("host", ""), ("content-type", "application/json"),
)  # fmt: skip
RAW = (
    b"", b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET", b"GET /v2 HTTP/9.9\r\n\r\n", b"A" * 70_000,
    b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
    b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
    b"GET /v2\0 HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET /v2 HTTP/1.1\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n:\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\nslow",
)  # fmt: skip


@pytest.fixture
def up(honest: Run, tmp_path: Path) -> Iterator[tuple[str, Server]]:
    run = protect(honest, "Sealed(levels=2)", tmp_path / "run", settings=Settings(recipe=RECIPE), device="cpu")
    limits = Limits(images=8, body=200_000, pixels=10_000, seconds=5)
    with running(of_run(run.folder, device="cpu"), tmp_path, limits=limits) as found:
        yield found


def picture(chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format=chance.choice(FORMATS))
    return buffer.getvalue()


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut off, changed in some bytes, or with something behind it."""
    kind, found = chance.randrange(4), bytearray(content)
    if kind == 0:
        return bytes(found[: chance.randrange(len(found))])
    if kind == 1:
        return bytes(found) + chance.randbytes(chance.randrange(1, 300))
    for _ in range(chance.choice((1, 4, 40))):
        found[chance.randrange(len(found))] = chance.randrange(256)
    return bytes(found)


def bomb(chance: random.Random) -> bytes:
    """A small file that says it holds billions of pixels."""
    buffer, side = io.BytesIO(), chance.choice((101, 5_000, 65_000))
    Image.new("L", (4, 4)).save(buffer, format=(kind := chance.choice(("PNG", "GIF", "BMP"))))
    found = bytearray(buffer.getvalue())
    if kind == "PNG":
        found[16:24] = struct.pack(">II", side, side)
    elif kind == "GIF":
        found[6:10] = struct.pack("<HH", side, side)
    else:
        found[18:26] = struct.pack("<ii", side, side)
    return bytes(found)


def changed(value: Any, chance: random.Random) -> Any:
    """The same JSON with one part of it left out, or replaced."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.2:
        return chance.choice(VALUES)
    if isinstance(value, list):
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance), *value[place + 1 :]]
    name = chance.choice(sorted(value))
    if chance.random() < 0.3:
        return {held: own for held, own in value.items() if held != name}
    return {**value, name: changed(value[name], chance)}


def good(chance: random.Random) -> dict[str, Any]:
    images = np.random.default_rng(chance.randrange(2**32)).random((2, 1, 12, 12), np.float32)
    found: dict[str, Any] = json.loads(asked(images, id="x", parameters={"binary_data_output": False}))
    if chance.random() < 0.4:
        found["outputs"] = [{"name": chance.choice(("probabilities", "logits", "classes", "network.logits", "images"))}]
    if chance.random() < 0.3:
        texts = [base64.b64encode(picture(chance)).decode() for _ in range(2)]
        found["inputs"][0] |= {"datatype": "BYTES", "shape": [2], "data": texts}
    return found


def binary(chance: random.Random) -> tuple[bytes, dict[str, str]]:
    raw = np.random.default_rng(chance.randrange(2**32)).random((2, 1, 12, 12), np.float32).tobytes()
    size = len(raw) + chance.choice((0, 0, -4, 3, 10**9))
    tensor = {"name": "images", "datatype": "FP32", "shape": [2, 1, 12, 12], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    length = len(head) + chance.choice((0, 0, -3, 5))
    body = head + raw
    return (damaged(body, chance) if chance.random() < 0.6 else body), {HEADER: str(length)}


def question(chance: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A method, a path, a body, and headers."""
    kind = chance.randrange(9)
    place, body, headers = "/v2/models/model/infer", json.dumps(good(chance)).encode(), {}
    if kind == 0:
        body = json.dumps(changed(good(chance), chance)).encode()
    elif kind == 1:
        body = damaged(body, chance)
    elif kind == 2:
        body, headers = binary(chance)
        headers["content-type"] = "application/octet-stream"
    elif kind == 3:
        place, body = "/predict", damaged(picture(chance), chance)
        headers["content-type"] = "image/png"
    elif kind == 4:
        place, body = "/predict", bomb(chance)
    elif kind == 5:
        headers["content-type"] = chance.choice(KINDS)
        place = chance.choice((place, "/predict"))
    elif kind == 6:
        name, value = chance.choice(HEADERS)
        headers[name] = value
    elif kind == 7:
        form = b'--b\r\ncontent-disposition: form-data; name="file"; filename="../../x.png"\r\n\r\n%b\r\n--b--\r\n'
        place, body = "/predict", damaged(form % picture(chance), chance)
        headers["content-type"] = "multipart/form-data; boundary=b"
    else:
        text = json.dumps(good(chance))
        for name in ("NaN", "Infinity", "-Infinity", "1e999", "[" * 5000, "9" * 5000):
            if chance.random() < 0.3:
                text = text.replace("0.", name, 1)
        body = text.encode()
    return chance.choice(("POST",) * 16 + ("GET", "PUT", "DELETE", "OPTIONS")), place, body, headers


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_two_thousand_bad_questions(up: tuple[str, Server], caplog: pytest.LogCaptureFixture) -> None:
    url, server = up
    table = protected_values(server)
    chance, statuses = random.Random(0), []
    with httpx2.Client(timeout=20) as client:
        for number in range(REQUESTS):
            method, place, body, headers = question(chance)
            if number % 50 == 0:
                headers["x-number"] = str(number)
            try:
                response = client.request(method, url + place, content=body, headers=headers)
            except (UnicodeEncodeError, httpx2.LocalProtocolError):  # which no client sends
                continue
            statuses.append(response.status_code)
            assert response.status_code in (200, 400, 401, 404, 405, 408, 413, 415, 431), response.text
            assert "Traceback" not in response.text
            if response.status_code == 200:
                require_protected(response, table)
            else:
                sentence = response.json()["error"]
                assert 10 < len(sentence) < 500, sentence
                assert sentence.endswith("."), sentence
    assert len(statuses) > 0.95 * REQUESTS
    assert set(statuses) >= {200, 400, 405, 413, 415}
    assert not [record for record in caplog.records if record.exc_info], "a request failed in the server"
    assert httpx2.get(f"{url}/v2/health/ready").status_code == 200


def test_bad_http_and_paths(up: tuple[str, Server], caplog: pytest.LogCaptureFixture) -> None:
    url, server = up
    table = protected_values(server)
    host, port = url.removeprefix("http://").split(":")
    wrong = [f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode() for path in PATHS]
    wrong += [
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
        for path in PATHS
    ]
    for content in (*RAW, *wrong):
        with socket.create_connection((host, int(port)), timeout=3) as raw:
            raw.sendall(content)
            raw.shutdown(socket.SHUT_WR)
            answer = received(raw)
        assert b"Traceback" not in answer
        assert b"root:" not in answer
        if answer:
            assert answer.split()[1] in (b"200", b"400", b"404", b"405", b"408", b"431"), answer
    assert not [record for record in caplog.records if record.exc_info]
    good = httpx2.post(
        infer(url), content=asked(np.zeros((1, 1, 12, 12))), headers={"content-type": "application/json"}
    )
    require_protected(good, table)


def received(raw: socket.socket) -> bytes:
    found = b""
    while part := raw.recv(65_536):
        found += part
    return found


def protected_values(server: Server) -> set[float]:
    """All probabilities that sealed answers can hold."""
    (response,) = server.served.predict.__closure__[1].cell_contents.network.responses  # type: ignore[index]
    return {round(value, 5) for value in response.table.exp().flatten().tolist()}


def require_protected(response: httpx2.Response, table: set[float]) -> None:
    """Fail for an answer in which anything is not of the table of sealed answers."""
    end = int(response.headers.get(HEADER, len(response.content)))
    found = json.loads(response.content[:end])
    if "probabilities" in found:
        assert {round(value, 5) for value in found["probabilities"].values()} <= table
        return
    assert [output["name"] for output in found["outputs"]] == ["probabilities"]
    (output,) = found["outputs"]
    values = output.get("data") or np.frombuffer(response.content[end:], "<f4").tolist()
    assert {round(value, 5) for value in values} <= table
