"""A server in a thread, for tests."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from undistill.serving.app import Server
from undistill.serving.keys import Keys
from undistill.serving.served import Served
from undistill.serving.server import listen, uvicorn_of


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
