"""A server in a thread, for tests."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from undistill.serving.app import Server
from undistill.serving.keys import Keys
from undistill.serving.served import Served
from undistill.serving.server import listen, uvicorn_of
from undistill.victims.protocols import HEADER


@contextmanager
def running(served: Served, folder: Path, **settings: Any) -> Iterator[tuple[str, Server]]:
    """The address of a server and the server itself; its keys lie in `folder`."""
    server = Server(served, Keys(folder / "keys.sqlite"), **settings)
    listening = listen("127.0.0.1", 0)
    web = uvicorn_of(server)
    thread = threading.Thread(target=lambda: web.run(sockets=[listening]), daemon=True)
    thread.start()
    while not web.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        web.should_exit = True
        thread.join(10)
        server.close()


def post(url: str, body: Any, kind: str = "application/json", **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.post(url, content=body, headers={"content-type": kind, **named}, timeout=20)


def infer(url: str) -> str:
    return f"{url}/v2/models/model/infer"


def asked(images: np.ndarray, **more: Any) -> str:
    tensor = {"name": "images", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}
    return json.dumps({"inputs": [tensor], **more})


def answer_of(response: httpx2.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    end = int(response.headers.get(HEADER, len(response.content)))
    (tensor,) = json.loads(response.content[:end])["outputs"]
    assert (tensor["name"], tensor["datatype"]) == ("probabilities", "FP32")
    flat = np.frombuffer(response.content[end:], "<f4") if end < len(response.content) else tensor["data"]
    return np.asarray(flat, np.float32).reshape(tensor["shape"])


def wait_for(url: str) -> None:
    for _ in range(400):
        try:
            if httpx2.get(f"{url}/v2/health/ready").status_code == 200:
                return
        except httpx2.RequestError:
            time.sleep(0.1)
    raise AssertionError("the server does not come up")
