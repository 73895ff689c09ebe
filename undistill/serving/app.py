"""The server as an ASGI application: Open Inference Protocol v2, and `POST /predict` with a picture."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from undistill import __version__
from undistill.core.errors import DataError, UndistillError, legible
from undistill.data.pictures import FORMATS, Reading, count_pixels, decode_picture
from undistill.data.views import to_float
from undistill.serving.batches import Batches, Outputs
from undistill.serving.keys import ANYBODY, Charge, Keys
from undistill.serving.limits import USUAL, Limits
from undistill.serving.refusals import Refusal
from undistill.serving.served import Served
from undistill.serving.telemetry import ALL, Events, Metrics, note
from undistill.serving.tensors import INPUT, Images, read_inference, write_inference
from undistill.ship.graph import CLASSES, PROBABILITIES
from undistill.victims import protocols
from undistill.victims.http import LOCAL

EXTENSIONS = ["binary_tensor_data"]
TENSORS = ("application/json", "application/octet-stream")
REQUEST_ID = 8  # bytes
READERS = 2  # requests that are read, and pictures that are decoded, side by side
LARGEST_HEADERS = 16 * 1024  # bytes


class Server:
    """Answers requests with what is served; each image is counted before it is answered."""

    def __init__(
        self,
        served: Served,
        keys: Keys,
        *,
        name: str = "model",
        limits: Limits = USUAL,
        most_in_all: int | None = None,
        webhook: str | None = None,
        anybody: bool = False,
    ) -> None:
        """
        Args:
            served: what answers.
            keys: who may ask, and the ledger.
            name: of the model in addresses.
            limits: of a request.
            most_in_all: images that all keys together may ask about; None is unlimited.
            webhook: address to which events are posted.
            anybody: without keys, answer whoever comes, and not only programs of this machine.
        """
        self.served, self.keys, self.name, self.limits, self.most_in_all = served, keys, name, limits, most_in_all
        self.anybody, self.held = anybody, 0
        self.batches = Batches(served.predict, largest=limits.images, most=limits.under_way, workers=served.workers)
        self.metrics = Metrics(lambda: self.batches.under_way)
        self.events = Events(keys, served.audited.queries if served.audited else {}, webhook)
        self.batches.on_batch = self.metrics.batches.observe
        self.events.on_event = lambda gap: self.metrics.events.labels(gap).inc()
        self._ledger = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._largest = limits.of_body(math.prod(served.shape))
        self._reading = Reading(served.reading.shaping, served.reading.background, limits.pixels)

    def app(self) -> ASGIApp:
        """The application, with a log line and metrics for every request."""
        models = [f"/v2/models/{self.name}", f"/v2/models/{self.name}/versions/{self.served.version}"]
        routes = [
            Route("/v2", self.about),
            Route("/v2/health/live", answering({"live": True})),
            Route("/v2/health/ready", answering({"ready": True})),
            *(Route(model, self.metadata) for model in models),
            *(Route(f"{model}/ready", answering({"name": self.name, "ready": True})) for model in models),
            *(Route(f"{model}/infer", self.infer, methods=["POST"]) for model in models),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/metrics", self.measured),
        ]
        handlers: dict[Any, Any] = {HTTPException: self._no_such_place, Refusal: refused, ClientDisconnect: gone}
        handlers[Exception] = failed
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Watched(app, self)

    def close(self) -> None:
        self.batches.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._ledger.shutdown()
        self.events.close()

    async def about(self, request: Request) -> Response:
        await self._account(request)
        return JSONResponse({"name": "undistill", "version": __version__, "extensions": EXTENSIONS})

    async def metadata(self, request: Request) -> Response:
        await self._account(request)
        served = self.served
        kinds = {PROBABILITIES: "FP32", CLASSES: "INT64"}
        return JSONResponse(
            {
                "name": self.name,
                "versions": [served.version],
                "platform": "undistill",
                "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *served.shape]}],
                "outputs": [
                    {"name": name, "datatype": kinds[name], "shape": [-1, served.width]} for name in served.outputs
                ],
                "parameters": {"classes": list(served.classes)},
            }
        )

    async def infer(self, request: Request) -> Response:
        """Open Inference Protocol: tensors or encoded pictures in, outputs by name."""
        account = await self._account(request)
        require_kind(request, TENSORS)
        async with self._body(request) as body:
            asked = await self._read(
                partial(read_inference, shape=self.served.shape, names=self.served.outputs, most=self.limits.images),
                protocols.Message(body, dict(request.headers)),
            )
            del body
            outputs = await self._answered(request, account, asked.images)
        named = dict(zip(self.served.outputs, outputs, strict=True))
        answer = write_inference(named, asked.outputs, model=self.name, version=self.served.version, own=asked.id)
        return Response(answer.body, headers=dict(answer.headers))

    async def predict(self, request: Request) -> Response:
        """One picture in, as the body or as the only file of a form; its class, and what is shown beside, out."""
        account = await self._account(request)
        async with self._picture(request) as content:
            outputs = await self._answered(request, account, [content])
        named = dict(zip(self.served.outputs, (one[0] for one in outputs), strict=True))
        return JSONResponse(self._by_name(named))

    async def measured(self, request: Request) -> Response:
        await self._account(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _by_name(self, outputs: dict[str, NDArray[Any]]) -> dict[str, Any]:
        p, classes = outputs.get(PROBABILITIES), outputs.get(CLASSES)
        if p is None:
            assert classes is not None
            return {"class": self.served.classes[int(classes[0])]}
        places = np.argsort(-p, kind="stable") if classes is None else np.arange(len(p))
        names = [self.served.classes[int(place if classes is None else classes[place])] for place in places]
        return {"class": names[0], "probabilities": dict(zip(names, p[places].tolist(), strict=True))}

    async def _account(self, request: Request) -> str:
        """The account of whoever asks, looked up before anything else of a request is read."""
        name: str = await self._in_ledger(self.keys.account, token_of(request))
        if name == ANYBODY and not (self.anybody or is_of_this_machine(request)):
            raise Refusal(401, "Without keys, only programs of this machine are answered; its owner can make one.")
        request.state.key = name
        return name

    async def _answered(self, request: Request, account: str, asked: Images) -> Outputs:
        """The outputs for images, each of which is counted before it is answered."""
        request.state.images = len(asked)
        with self.batches.room(len(asked)):
            await self._in_ledger(self.keys.require_left, account, len(asked), self.most_in_all)
            try:
                async with asyncio.timeout(self.limits.seconds) as end:
                    images = asked if isinstance(asked, np.ndarray) else await self._read(self._decoded, asked)
            except TimeoutError:
                raise self._too_slow() from None
            content = [image.tobytes() for image in images]
            charge = await self._in_ledger(self.keys.charge, account, content, self.most_in_all)
            outputs = await self._computed(images, charge, end.when())
        self.metrics.images.inc(len(images))
        await self._in_ledger(self.events.passed, account, charge.billed)
        await self._in_ledger(self.events.passed, ALL, charge.billed_in_all)
        return outputs

    async def _computed(self, images: NDArray[np.float32], charge: Charge, end: float | None) -> Outputs:
        """The outputs for images that were counted; where there are none, they are taken off the bill."""
        try:
            async with asyncio.timeout_at(end):
                return await self.batches(images)
        except BaseException as error:
            await asyncio.shield(self._in_ledger(self.keys.refund, charge))
            if isinstance(error, TimeoutError):
                raise self._too_slow() from None
            if isinstance(error, UndistillError):  # whose sentence may name an address behind a gateway
                note("the model failed", logging.ERROR, why=legible(str(error)))
                raise Refusal(502, "The model does not answer as it should; ask again later.") from None
            raise

    def _too_slow(self) -> Refusal:
        return Refusal(504, f"No answer within {self.limits.seconds:g} seconds; ask again later.")

    async def _in_ledger(self, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._ledger, work, *given)

    async def _read(self, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *given)

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, of limited size, within limited time; inside, it counts among those that are held."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "Compressed bodies are not taken.")
        content, size = [], 0
        try:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    async for part in request.stream():
                        content.append(part)
                        size, self.held = size + len(part), self.held + len(part)
                        self._require_small(size)
            except TimeoutError:
                raise Refusal(408, f"The body did not arrive within {self.limits.seconds:g} seconds.") from None
            yield b"".join(content)
        finally:
            self.held -= size

    def _require_small(self, size: int) -> None:
        """Raise `Refusal` for a body that is too large, or one too many."""
        if size > self._largest:
            raise Refusal(413, f"A body has at most {self._largest:,} bytes; binary tensors take fewest.")
        if self.held > self.limits.held:
            raise Refusal(503, "Too many bodies are under way; ask again in a second.", retry_after="1")

    @asynccontextmanager
    async def _picture(self, request: Request) -> AsyncIterator[bytes]:
        kind = kind_of(request)
        if kind and kind not in ("multipart/form-data", "application/octet-stream") and not kind.startswith("image/"):
            ways = (
                "(curl -H 'Content-Type: image/png' --data-binary @x.png), or as a file of a form (curl -F file=@x.png)"
            )
            raise Refusal(415, f"Send a picture as the body, with its type {ways}.")
        async with self._body(request) as body:
            yield await file_of_form(request, body) if kind == "multipart/form-data" else body

    def _decoded(self, pictures: list[bytes]) -> NDArray[np.float32]:
        """Encoded pictures as images (B, C, H, W)."""
        channels, height, width = self.served.shape
        try:
            if (pixels := sum(map(count_pixels, pictures))) > self.limits.pixels:
                raise Refusal(
                    413, f"Pictures of {pixels:,} pixels were sent; a request may hold {self.limits.pixels:,}."
                )
            found = [decode_picture(one, channels, (width, height), self._reading) for one in pictures]
        except (DataError, MemoryError) as error:
            raise Refusal(400, str(error) or f"A picture cannot be read; {', '.join(FORMATS)} can.") from None
        return to_float(torch.stack(found)).numpy()

    async def _no_such_place(self, request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            return complaint(405, "This place takes POST to ask, and GET to look.", **(error.headers or {}))
        known = f"/v2/models/{self.name}, /v2/models/{self.name}/infer, /predict, /v2/health/ready, /metrics"
        return complaint(error.status_code, f"Nothing is there. There are: {known}.")


class Watched:
    """Around the application: a limit of requests, a log line and metrics for each, and no traceback for anybody."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server, self.under_way = app, server, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, own = time.perf_counter(), 0, secrets.token_hex(REQUEST_ID)
        scope.setdefault("state", {})["request"] = own

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", own.encode()), (b"cache-control", b"no-store")]
                message["headers"] = [*message["headers"], *more, (b"x-content-type-options", b"nosniff")]
            await send(message)

        self.under_way += 1
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > LARGEST_HEADERS:
                await complaint(431, f"Headers have at most {LARGEST_HEADERS:,} bytes.")(scope, receive, sending)
            elif self.under_way > self.server.limits.requests and place_of(scope["path"]) != "health":
                await complaint(503, "Too many requests are under way.", retry_after="1")(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except Exception:  # which `failed` has answered
            note("failed", logging.ERROR, traceback=True, request=own)
        finally:
            self.under_way -= 1
            self._record(scope, status, time.perf_counter() - started, own)
        return None

    def _record(self, scope: Scope, status: int, seconds: float, own: str) -> None:
        place, state = place_of(scope["path"]), scope["state"]
        self.server.metrics.requests.labels(place, str(status)).inc()
        self.server.metrics.seconds.labels(place).observe(seconds)
        if place in ("health", "metrics") and status == 200:
            return
        fields = {name: state[name] for name in ("key", "images") if name in state}
        ms = round(1000 * seconds, 2)
        note("request", request=own, method=scope["method"], place=place, status=status, ms=ms, **fields)


def place_of(path: str) -> str:
    """The kind of place that a path names, of which there are few."""
    if path.startswith("/v2"):
        kinds = {"infer": "infer", "live": "health", "ready": "health"}
        return kinds.get(path.rsplit("/", 1)[-1], "metadata")
    return path[1:] if path in ("/predict", "/metrics") else "elsewhere"


def token_of(request: Request) -> str | None:
    """The key that a request brings."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.casefold() == "bearer" and token:
        return token.strip()
    return request.headers.get("x-api-key")


def kind_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().casefold()


def require_kind(request: Request, kinds: tuple[str, ...]) -> None:
    if (kind := kind_of(request)) and kind not in kinds:
        raise Refusal(415, f"The content type is one of {', '.join(kinds)}; not {legible(kind)[:60]}.")


async def file_of_form(request: Request, body: bytes) -> bytes:
    """The only file of a form."""
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream() -> Any:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=10).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refusal(400, f"The form cannot be read ({legible(str(error))[:100]}).") from None
    files = [value for value in form.values() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise Refusal(400, "The form must hold one file, the picture.")
    content = await files[0].read()
    await form.close()
    return content


def complaint(status: int, sentence: str, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": sentence}, status, named)


async def refused(request: Request, error: Refusal) -> Response:
    headers = {"www_authenticate": "Bearer"} if error.status == 401 else {}
    return complaint(error.status, error.sentence, **error.headers, **headers)


async def failed(request: Request, error: Exception) -> Response:
    return complaint(500, f"The server failed; its log says why, under request {request.state.request}.")


def answering(content: Mapping[str, object]) -> Callable[[Request], Awaitable[Response]]:
    """A place that always says the same, to anybody."""

    async def answer(request: Request) -> Response:
        return JSONResponse(content)

    return answer


def is_of_this_machine(request: Request) -> bool:
    """Whether a request names this machine as its host, and no proxy brought it from elsewhere.

    A page in a browser can reach this machine, too, but under the name that it came from.
    """
    brought = {"forwarded", "x-forwarded-for", "x-real-ip", "via"} & {*request.headers.keys()}
    return not brought and request.url.hostname in LOCAL and request.headers.get("origin") is None


async def gone(request: Request, error: ClientDisconnect) -> Response:
    return complaint(400, "The request broke off.")
