"""`serve`: a model with its protection behind HTTP, until it is told to stop."""

import ipaddress
import logging
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from torch import nn

from undistill.core.errors import SpecError
from undistill.data.arrays import Images
from undistill.defences.defence import Defence
from undistill.models.model import Model
from undistill.serving.gateway import of_upstream
from undistill.serving.keys import KEYS, Keys, beside, require_state
from undistill.serving.limits import USUAL, Limits
from undistill.serving.served import Served, is_export, of_export, of_run

if TYPE_CHECKING:
    import uvicorn

    from undistill.serving.app import Server

BACKLOG = 512  # connections that wait to be taken
IDLE = 20  # seconds that a connection stays open without a request
LAST = 30  # seconds that requests have to end in when the server stops


def serve(
    what: str | Path | None = None,
    *,
    upstream: str | None = None,
    defences: Sequence[str | Defence] = (),
    data: Images | None = None,
    state: str | Path | None = None,
    audit: str | Path | None = None,
    model: str | Model | nn.Module | Callable[..., nn.Module] | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    name: str = "model",
    limits: Limits = USUAL,
    total_budget: int | None = None,
    webhook: str | None = None,
    without_keys: bool = False,
    device: str = "auto",
) -> None:
    """Answer over HTTP with a run, an exported folder, or a model elsewhere, until a signal comes.

    Args:
        what: a run folder (run by torch), or an exported one (by onnxruntime).
        upstream: instead, a model that stays where it is, such as "Http('http://127.0.0.1:9000')".
        defences: with `upstream`, the responses before it; else responses of the user's own, named again.
        data: with `upstream`, images on which it works; validation images calibrate the responses.
        state: folder of keys and counts, and of what a gateway knows; RUN-serve by default.
        audit: an audit of this very run, or of the gateway, whose curve says at which counts an event is due. An
            exported folder brings its own.
        model: the user's own network, named again, since a stored run may not execute code by itself.
        host: address to listen on. Others than this machine's own need keys.
        port: 0 takes a free one.
        name: of the model in addresses.
        limits: of requests.
        total_budget: images that all keys together may ask about.
        webhook: address to which events are posted.
        without_keys: listen on `host` even if there are no keys.
        device: auto, cpu, cuda or cuda:N, for a run.
    """
    require_installed()
    require_address(webhook)
    if not re.fullmatch(r"[\w.-]{1,100}", name):
        raise SpecError(f"'{name}' cannot be a model's name in an address; letters, digits and . _ - can.")
    place = state_of(what, upstream, state)
    keys = Keys(place / KEYS)
    if not (is_loopback(host) or without_keys or keys.accounts()):
        raise SpecError(
            f"Whoever reaches {host} could ask without end, since there are no keys: make one with 'undistill serve "
            "keys add', or say that this is meant with --without-keys."
        )
    if upstream is not None:
        if data is None:
            raise SpecError("A gateway needs images by which its responses are calibrated: --data DATA.")
        if model is not None:
            raise SpecError("--model is for a run; a model behind a gateway is not opened.")
        if device != "auto":
            raise SpecError("--device is for a run; a model behind a gateway runs where it is.")
        served = of_upstream(upstream, defences, data, place, None if audit is None else Path(audit))
    else:
        assert what is not None
        if data is not None:
            raise SpecError("--data is for --upstream; a run or an exported folder knows its images.")
        served = _of_folder(Path(what), audit, model, defences, device)
    from undistill.serving.app import Server

    listening = listen(host, port)
    server = Server(
        served,
        keys,
        name=name,
        limits=limits,
        most_in_all=total_budget,
        webhook=webhook,
        anybody=without_keys,
    )
    run(server, listening)


def _of_folder(
    folder: Path,
    audit: str | Path | None,
    model: str | Model | nn.Module | Callable[..., nn.Module] | None,
    defences: Sequence[str | Defence],
    device: str,
) -> Served:
    if not is_export(folder):
        given = None if audit is None else Path(audit)
        return of_run(folder, audit=given, model=model, defences=defences, device=device)
    if audit is not None or model is not None or defences or device != "auto":
        raise SpecError(
            f"{folder} is an exported folder: it holds its network, responses and verdict, and is run by onnxruntime; "
            "leave out --model, --defence, --audit and --device."
        )
    return of_export(folder)


def run(server: "Server", listening: socket.socket) -> None:
    """Serve on a socket until SIGTERM or SIGINT; requests that are under way are answered first."""
    from undistill.serving.telemetry import note

    host, port = listening.getsockname()[:2]
    names, curve = [account.name for account in server.keys.accounts()], server.events.within
    note(
        "ready",
        address=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
        model=server.served.title,
        version=server.served.version,
        keys=names,
        events_at=sorted(curve.values()),
    )
    if not names:
        who = "everybody" if server.anybody else "every program of this machine"
        note("no keys", logging.WARNING, answered=who)
    server.events.catch_up()
    try:
        uvicorn_of(server).run(sockets=[listening])
    finally:
        server.close()
        note("stopped", billed=server.keys.billed)


def uvicorn_of(server: "Server") -> "uvicorn.Server":
    """Uvicorn for an application. It ends in order at a signal, and does not raise that signal again."""
    import uvicorn

    from undistill.serving.app import LARGEST_HEADERS

    config = uvicorn.Config(
        server.app(),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=LARGEST_HEADERS,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=LAST,
    )

    class Ending(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            with super().capture_signals():
                yield
                self._captured_signals.clear()

    return Ending(config)


def write_log() -> None:
    """The log of a server, as lines of JSON on standard error."""
    from undistill.serving.telemetry import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("undistill.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("undistill.serving").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def require_installed() -> None:
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise SpecError(f"A server needs {error.name}: pip install 'undistill[serve]'.") from None


def require_address(webhook: str | None) -> None:
    """Raise `SpecError` for a webhook that is none, or cannot be posted to."""
    if webhook is None:
        return
    parts = urlsplit(webhook)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError("The address of --webhook begins with http:// or https:// and a host.")
    try:
        import httpx2  # noqa: F401
    except ImportError:
        raise SpecError("A webhook needs httpx2: pip install 'undistill[http]'.") from None


def state_of(what: str | Path | None, upstream: str | None, state: str | Path | None) -> Path:
    """The folder of keys and counts."""
    if what is not None and upstream is not None:
        raise SpecError(f"Either {what} is served, or the model that --upstream names; leave out one of them.")
    if what is None and upstream is None:
        raise SpecError("Name what is served: a run, an exported folder, or a model elsewhere with --upstream.")
    if state is not None:
        require_state(Path(state))
        return Path(state)
    if what is None:
        raise SpecError("A gateway needs a folder for keys and counts: --state DIR.")
    return beside(Path(what))


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; `SpecError` where that address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once, and not 40 ms later, on sockets that are known to be of TCP
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise SpecError(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}. Name another --port or --host."
        ) from None
    return listening
