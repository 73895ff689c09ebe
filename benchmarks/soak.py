"""A server under load, beside onnxruntime alone: `python -m benchmarks.soak EXPORT --minutes 30`.

Eight clients on the loopback interface ask a server in a process of its own, each with a key. Measured are images a
second against a session of onnxruntime with the same batch size before and after, latency, memory of the server after
a warm-up, and whether the ledger is that of the clients. Then a key with a small budget is asked by all clients at
once, and at last the server is killed while it answers. Prints Markdown; an error or a miscount ends it.
"""

import argparse
import json
import os
import platform
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnxruntime

from undistill import __version__
from undistill.serving.keys import Keys
from undistill.ship.manifest import read_manifest
from undistill.victims.protocols import HEADER

BODIES = 16  # different requests of a client
WARM = 60.0  # seconds until memory counts
RAW = 20.0  # seconds that onnxruntime is measured alone


class Client:
    """Asks again and again, and keeps count."""

    def __init__(self, url: str, token: str, shape: tuple[int, int, int], size: int, seed: int) -> None:
        self.url, self.size = f"{url}/v2/models/model/infer", size
        images = np.random.default_rng(seed).random((BODIES, size, *shape), np.float32)
        self.messages = [message(part) for part in images]
        self.web = httpx2.Client(headers={"authorization": f"Bearer {token}"}, timeout=60)
        self.answered, self.latencies, self.statuses = 0, list[float](), set[int]()

    def ask(self, number: int) -> bool:
        body, headers = self.messages[number % BODIES]
        start = time.perf_counter()
        try:
            response = self.web.post(self.url, content=body, headers=headers)
        except httpx2.RequestError:
            return False
        self.latencies.append(time.perf_counter() - start)
        self.statuses.add(response.status_code)
        if response.status_code == 200:
            end = int(response.headers[HEADER])
            p = np.frombuffer(response.content[end:], "<f4").reshape(self.size, -1)
            assert np.allclose(p.sum(1), 1, atol=1e-3), "an answer is no distribution"
            self.answered += self.size
        return True

    def until(self, done: Callable[[], bool]) -> None:
        number = 0
        while not done() and self.ask(number):
            number += 1


def message(images: np.ndarray) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "images", "datatype": "FP32", "shape": list(images.shape)}
    tensor["parameters"] = {"binary_data_size": images.nbytes}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + images.tobytes(), {"content-type": "application/octet-stream", HEADER: str(len(head))}


def together(clients: list[Client], seconds: float) -> float:
    """All clients at once for some seconds; returns how many it took."""
    start = time.perf_counter()
    threads = [
        threading.Thread(target=client.until, args=(lambda: time.perf_counter() - start > seconds,))
        for client in clients
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def raw(path: Path, shape: tuple[int, int, int], size: int, seconds: float) -> float:
    """Images a second of onnxruntime alone."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).random((size, *shape), np.float32)
    session.run(None, {"images": images})
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        session.run(None, {"images": images})
        count += size
    return count / (time.perf_counter() - start)


@contextmanager
def server(folder: Path, state: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "undistill", "serve", str(folder), "--port", str(port), "--state", str(state)]
    with (state / "log").open("ab") as log:
        process = subprocess.Popen(command, stderr=log)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            httpx2.get(f"{url}/v2/health/ready").raise_for_status()
            break
        except httpx2.RequestError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
    try:
        yield url, process
    finally:
        process.terminate()
        process.wait()


def memory(process: "subprocess.Popen[bytes]") -> float:
    """MiB that a process has in main memory."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def watch(process: "subprocess.Popen[bytes]", found: list[float], end: threading.Event) -> None:
    while not end.wait(10):
        found.append(memory(process))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="images of a request")
    given = parser.parse_args()
    manifest, size = read_manifest(given.export), given.size
    shape, path = manifest.shape, given.export / "model.onnx"
    state = Path(tempfile.mkdtemp())
    keys = Keys(state / "keys.sqlite")
    tokens = [keys.add(f"client-{number}", None) for number in range(given.clients)]
    small = keys.add("small", 10 * size + size // 2)
    rates = [raw(path, shape, size, RAW)]
    with server(given.export, state) as (url, process):
        clients = [Client(url, token, shape, size, seed) for seed, token in enumerate(tokens)]
        held, end = list[float](), threading.Event()
        watcher = threading.Thread(target=watch, args=(process, held, end))
        watcher.start()
        seconds = together(clients, 60 * given.minutes)
        end.set()
        watcher.join()
        answered = sum(client.answered for client in clients)
        assert {status for client in clients for status in client.statuses} == {200}
        assert [one.billed for one in keys.accounts()[: given.clients]] == [client.answered for client in clients]
        greedy = [Client(url, small, shape, size, seed) for seed in range(given.clients)]
        together(greedy, 15)
        (spent,) = (one for one in keys.accounts() if one.name == "small")
        assert sum(client.answered for client in greedy) == spent.billed == 10 * size
        rates.append(raw(path, shape, size, RAW))
    print_soak(manifest.network, given, clients, answered / seconds, rates, held, answered)
    with server(given.export, state) as (url, process):
        before = {one.name: one.billed for one in keys.accounts()}
        clients = [Client(url, token, shape, size, seed) for seed, token in enumerate(tokens)]
        threading.Timer(10, lambda: os.kill(process.pid, signal.SIGKILL)).start()
        together(clients, 60)
    counted = [one.billed - before[one.name] for one in keys.accounts() if one.name != "small"]
    for client, count in zip(clients, counted, strict=True):
        assert client.answered <= count <= client.answered + size
    print(
        f"\nKilled while it answered: {sum(client.answered for client in clients):,} images had been answered, and "
        f"{sum(counted):,} were counted."
    )


def print_soak(
    network: str, given: Any, clients: list[Client], rate: float, rates: list[float], held: list[float], answered: int
) -> None:
    latencies = sorted(1000 * one for client in clients for one in client.latencies)
    cuts = statistics.quantiles(latencies, n=20)
    warm = held[int(WARM / 10) :] or held
    alone = statistics.fmean(rates)
    print(
        f"{network}, {given.clients} clients, {given.size} images a request, {given.minutes:g} minutes; undistill "
        f"{__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}, {os.cpu_count()} cores\n\n"
        "| images | images/s | onnxruntime alone, before, after | share | p50 | p95 | memory, warm | growth |\n"
        "|---|---|---|---|---|---|---|---|\n"
        f"| {answered:,} | {rate:.0f} | {rates[0]:.0f}, {rates[1]:.0f} | {rate / alone:.0%} | {cuts[9]:.0f} ms | "
        f"{cuts[18]:.0f} ms | {warm[0]:.0f} MiB | {max(warm[len(warm) // 2 :]) / warm[0] - 1:+.1%} |\n\n"
        f"No error; the ledger is that of the clients. A key for {10 * given.size + given.size // 2} images got "
        f"{10 * given.size}."
    )


if __name__ == "__main__":
    main()
