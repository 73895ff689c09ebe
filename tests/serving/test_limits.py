"""A server that is asked too much, or fails, bills nobody for nothing and leaves no answer uncounted."""

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from tests.serving.server import answer_of, asked, infer, post, running, wait_for
from undistill.serving.app import Server
from undistill.serving.limits import Limits
from undistill.serving.served import Served
from undistill.ship.manifest import Audited
from undistill.victims.protocols import png

pytest.importorskip("onnxscript")
AUDITED = Audited(
    sentence="...", made="2026-01-01", suite="quick-2", best_copy=0.9, queries={"0.1": 4, "0.05": 8}, report_sha256="0"
)


def test_many_clients_never_pass_a_budget_and_every_answer_is_right(served: Served, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    all_images = [random.random((int(size), 1, 12, 12), np.float32) for size in random.integers(1, 9, 60)]
    with running(served, tmp_path) as (url, server):
        token = server.keys.add("alice", 150)

        def ask(images: np.ndarray) -> int:
            response = post(infer(url), asked(images), authorization=f"Bearer {token}")
            if response.status_code == 403:
                return 0
            assert np.allclose(answer_of(response), served.predict(images)[0], atol=1e-5)
            return len(images)

        with ThreadPoolExecutor(8) as pool:
            answered = sum(pool.map(ask, all_images))
        assert answered == server.keys.accounts()[0].billed <= 150


def test_a_model_that_fails_is_not_billed(served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(images: np.ndarray) -> list[np.ndarray]:
        raise ValueError("a secret of the house")

    with running(replace(served, predict=broken), tmp_path) as (url, server):
        response = post(infer(url), asked(np.zeros((2, 1, 12, 12))))
        (account,) = server.keys.accounts(everybody=True)
    assert response.status_code == 500
    assert response.json()["error"].startswith("The server failed; its log says why, under request ")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert (account.asked, account.billed) == (2, 0)
    assert any("secret" in str(record.exc_info) for record in caplog.records)  # the owner learns why


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: [p[0][1:]],
        lambda p: [np.concatenate([p[0], p[0][:1]])],
        lambda p: [np.where(np.arange(3) == 1, np.nan, p[0])],
    ],
)
def test_nobody_gets_the_answer_of_another(wrong: Any, served: Served, tmp_path: Path) -> None:
    """A model that loses a row of a batch, or answers NaN, has answered none of it."""
    bad = replace(served, predict=lambda images: wrong(served.predict(images)))
    with running(bad, tmp_path) as (url, server):
        assert post(infer(url), asked(np.zeros((3, 1, 12, 12)))).status_code == 502
        assert server.keys.accounts(everybody=True)[0].billed == 0


def test_a_batch_that_fails_does_not_hold_the_next(served: Served, tmp_path: Path) -> None:
    failures = iter([MemoryError()])
    with running(served, tmp_path) as (url, server):

        def on_batch(size: int) -> None:
            for failure in failures:
                raise failure

        server.batches.on_batch = on_batch
        statuses = [post(infer(url), asked(np.zeros((1, 1, 12, 12)))).status_code for _ in range(3)]
    assert statuses == [500, 200, 200]


def test_pictures_are_decoded_only_for_who_may_ask_and_in_time(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def slow(content: bytes, *_: Any) -> torch.Tensor:
        decoded.append(len(content))
        time.sleep(1)
        return torch.zeros(1, 12, 12, dtype=torch.uint8)

    monkeypatch.setattr("undistill.serving.app.decode_picture", slow)
    picture = png(torch.zeros(1, 12, 12))
    with running(served, tmp_path, limits=Limits(seconds=0.3)) as (url, server):
        token = server.keys.add("nothing", 0)
        assert post(f"{url}/predict", picture, "image/png", x_api_key=token).status_code == 403
        assert decoded == []
        token = server.keys.add("some", 5)
        assert post(f"{url}/predict", picture, "image/png", x_api_key=token).status_code == 504
        assert [one.billed for one in server.keys.accounts()] == [0, 0]


def test_a_long_text_among_numbers_takes_no_memory(up: tuple[str, Server]) -> None:
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, 1, 12, 12]}
    for data in (
        ["x" * 10_000] + [""] * 143,
        [[0.5] * 143, 0.5],
        [[[[[[[0.5] * 144]]]]]],
        [10**400] * 144,
        [True] * 144,
    ):
        body = json.dumps({"inputs": [{**tensor, "data": data}]})
        assert "144 numbers" in post(infer(up[0]), body).json()["error"]


def test_health_is_told_however_much_is_asked(served: Served, tmp_path: Path) -> None:
    with running(served, tmp_path, limits=Limits(requests=0)) as (url, _):
        assert post(infer(url), asked(np.zeros((1, 1, 12, 12)))).status_code == 503
        assert httpx2.get(f"{url}/v2/health/live").json() == {"live": True}
        assert httpx2.get(f"{url}/v2/models/model/ready").json() == {"name": "model", "ready": True}


def test_an_answer_that_takes_too_long_is_not_billed(served: Served, tmp_path: Path) -> None:
    def slow(images: np.ndarray) -> list[np.ndarray]:
        time.sleep(1)
        return served.predict(images)

    with running(replace(served, predict=slow), tmp_path, limits=Limits(seconds=0.2)) as (url, server):
        assert post(infer(url), asked(np.zeros((2, 1, 12, 12)))).status_code == 504
        assert server.keys.accounts(everybody=True)[0].billed == 0


def test_what_arrives_while_the_model_is_busy_becomes_one_batch(served: Served, tmp_path: Path) -> None:
    sizes: list[int] = []

    def watched(images: np.ndarray) -> list[np.ndarray]:
        sizes.append(len(images))
        time.sleep(0.3)
        return served.predict(images)

    limits = Limits(images=8)
    with running(replace(served, predict=watched), tmp_path, limits=limits) as (url, _), ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: post(infer(url), asked(np.zeros((2, 1, 12, 12)))).status_code, range(8)))
    assert statuses == [200] * 8
    assert sum(sizes) == 16
    assert max(sizes) == 8
    assert len(sizes) <= 4


def test_too_much_at_once_is_refused_and_not_billed(served: Served, tmp_path: Path) -> None:
    free = threading.Event()

    def waits(images: np.ndarray) -> list[np.ndarray]:
        free.wait(10)
        return served.predict(images)

    limits = Limits(images=2, under_way=6)
    with running(replace(served, predict=waits), tmp_path, limits=limits) as (url, server):
        with ThreadPoolExecutor(10) as pool:
            found = [pool.submit(post, infer(url), asked(np.zeros((2, 1, 12, 12)))) for _ in range(10)]
            while sum(one.done() for one in found) < 3:
                time.sleep(0.02)
            free.set()
        responses = [one.result() for one in found]
        answered = sum(one.status_code == 200 for one in responses)
        refused = [one for one in responses if one.status_code == 503]
        assert len(refused) >= 3
        assert refused[0].headers["retry-after"] == "1"
        assert server.keys.accounts(everybody=True)[0].billed == 2 * answered


def test_limits_of_a_request(served: Served, tmp_path: Path) -> None:
    limits = Limits(images=4, body=20_000, pixels=900, seconds=0.4)
    with running(served, tmp_path, limits=limits) as (url, server):
        assert post(infer(url), asked(np.zeros((5, 1, 12, 12)))).status_code == 413
        assert post(infer(url), b"x" * 30_000).status_code == 413
        picture = png(torch.rand(1, 31, 30))
        assert post(f"{url}/predict", picture, "image/png").status_code == 413
        bomb = bytearray(png(torch.zeros(1, 8, 8)))
        bomb[16:24] = struct.pack(">II", 50_000, 50_000)  # of which nothing is decoded
        assert post(f"{url}/predict", bytes(bomb), "image/png").status_code in (400, 413)
        many = [base64.b64encode(png(torch.rand(1, 20, 20))).decode()] * 3
        tensor = {"name": "images", "datatype": "BYTES", "shape": [3, 1], "data": many}
        assert "Pictures of 1,200 pixels" in post(infer(url), json.dumps({"inputs": [tensor]})).json()["error"]
        place = (url.split("/")[2].split(":")[0], int(url.rsplit(":", 1)[1]))
        with socket.create_connection(place) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nhalf")
            assert b" 408 " in slow.recv(4096)
        with socket.create_connection(place) as large:
            large.sendall(b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 40_000 + b"\r\n\r\n")
            assert large.recv(4096).split()[1] in (b"400", b"431")
        assert server.keys.accounts(everybody=True) == []


def test_a_server_that_is_killed_gave_no_answer_uncounted(exported: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "undistill", "serve", str(exported), "--port", str(port), "--state", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    wait_for(url)
    answered = [0] * 4

    def ask(number: int) -> None:
        images = np.random.default_rng(number).random((3, 1, 12, 12), np.float32)
        while True:
            try:
                answered[number] += 3 * (post(infer(url), asked(images)).status_code == 200)
            except httpx2.RequestError:
                return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for thread in threads:
        thread.join()
    from undistill.serving.keys import Keys

    (account,) = Keys(tmp_path / "keys.sqlite").accounts(everybody=True)
    assert 0 < sum(answered) <= account.billed <= sum(answered) + 4 * 3


def test_a_server_that_is_told_to_stop_answers_first(exported: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "undistill", "serve", str(exported), "--port", str(port), "--state", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    wait_for(f"http://127.0.0.1:{port}")
    body = asked(np.zeros((1, 1, 12, 12))).encode()
    with socket.create_connection(("127.0.0.1", port)) as slow:
        head = (
            f"POST /v2/models/model/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        )
        slow.sendall(head + body[:10])
        time.sleep(0.2)
        process.terminate()
        time.sleep(0.3)
        slow.sendall(body[10:])
        assert b" 200 " in slow.recv(4096)
    log = process.communicate(timeout=20)[1]
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["event"] for line in lines] == ["ready", "no keys", "request", "stopped"]
    assert lines[-1]["billed"] == 1
