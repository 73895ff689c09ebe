"""The server as an ASGI application: Open Inference Protocol v2, and `POST /predict` with a picture."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from undistill import __version__
from undistill.core.errors import DataError, UndistillError, legible
from undistill.data.pictures import FORMATS, Reading, TooManyPixels, decode_picture
from undistill.data.views import to_float
from undistill.serving.batches import Batches, Outputs
from undistill.serving.keys import Charge, Keys
from undistill.serving.limits import USUAL, Limits
from undistill.serving.refusals import Refusal
from undistill.serving.served import Served
from undistill.serving.telemetry import Events, Metrics, note
from undistill.serving.tensors import INPUT, Inference, read_inference, write_inference
from undistill.ship.graph import CLASSES, PROBABILITIES
from undistill.victims import protocols

EXTENSIONS = ["binary_tensor_data"]
TENSORS = ("application/json", "application/octet-stream")
REQUEST_ID = 8  # bytes
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
    ) -> None:
        """
        Args:
            served: what answers.
            keys: who may ask, and the ledger.
            name: of the model in addresses.
            limits: of a request.
            most_in_all: images that all keys together may ask about; None is unlimited.
            webhook: address to which events are posted.
        """
        self.served, self.keys, self.name, self.limits, self.most_in_all = served, keys, name, limits, most_in_all
        self.batches = Batches(served.predict, largest=limits.images, most=limits.under_way, workers=served.workers)
        self.metrics = Metrics(lambda: self.batches.under_way)
        self.events = Events(served.audited.queries if served.audited else {}, webhook)
        self.batches.on_batch = self.metrics.batches.observe
        self.events.on_event = lambda gap: self.metrics.events.labels(gap).inc()
        self._ledger = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._reading = Reading(served.reading.shaping, served.reading.background, limits.pixels)

    def app(self) -> ASGIApp:
        """The application, with a log line and metrics for every request."""
        models = [f"/v2/models/{self.name}", f"/v2/models/{self.name}/versions/{self.served.version}"]
        routes = [
            Route("/v2", self.about),
            Route("/v2/health/live", self.healthy),
            Route("/v2/health/ready", self.healthy),
            *(Route(model, self.metadata) for model in models),
            *(Route(f"{model}/ready", self.healthy) for model in models),
            *(Route(f"{model}/infer", self.infer, methods=["POST"]) for model in models),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/metrics", self.measured),
        ]
        handlers: dict[Any, Any] = {HTTPException: self._no_such_place, Refusal: refused, ClientDisconnect: gone}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Watched(app, self)

    def close(self) -> None:
        self.batches.close()
        self._ledger.shutdown()
        self.events.close()

    async def healthy(self, request: Request) -> Response:
        return JSONResponse({"live": True, "ready": True})

    async def about(self, request: Request) -> Response:
        await self._account(request)
        return JSONResponse({"name": "undistill", "version": __version__, "extensions": EXTENSIONS})

    async def metadata(self, request: Request) -> Response:
        await self._account(request)
        served = self.served
        width = len(served.classes) if served.outputs == (PROBABILITIES,) else -1
        kinds = {PROBABILITIES: "FP32", CLASSES: "INT64"}
        return JSONResponse(
            {
                "name": self.name,
                "versions": [served.version],
                "platform": "undistill",
                "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *served.shape]}],
                "outputs": [{"name": name, "datatype": kinds[name], "shape": [-1, width]} for name in served.outputs],
                "parameters": {"classes": list(served.classes)},
            }
        )

    async def infer(self, request: Request) -> Response:
        """Open Inference Protocol: tensors or encoded pictures in, outputs by name."""
        account = await self._account(request)
        require_kind(request, TENSORS)
        message = protocols.Message(await self._body(request), dict(request.headers))
        asked: Inference = await asyncio.to_thread(
            read_inference,
            message,
            shape=self.served.shape,
            names=self.served.outputs,
            most=self.limits.images,
            decode=self._decoded,
        )
        outputs = await self._answered(request, account, asked.images)
        named = dict(zip(self.served.outputs, outputs, strict=True))
        answer = write_inference(named, asked.outputs, model=self.name, version=self.served.version, own=asked.id)
        return Response(answer.body, headers=dict(answer.headers))

    async def predict(self, request: Request) -> Response:
        """One picture in, as the body or as the only file of a form; its class, and what is shown beside, out."""
        account = await self._account(request)
        content = await self._picture(request)
        images = (await asyncio.to_thread(self._decoded, content))[None]
        outputs = await self._answered(request, account, images)
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
        """Who asks; before anything else of a request is read."""
        name: str = await self._in_ledger(self.keys.account, token_of(request))
        request.state.key = name
        return name

    async def _answered(self, request: Request, account: str, images: NDArray[np.float32]) -> Outputs:
        """The outputs for images, each of which is counted before it is answered."""
        request.state.images = len(images)
        with self.batches.room(len(images)):
            content = [image.tobytes() for image in images]
            charge = await self._in_ledger(self.keys.charge, account, content, self.most_in_all)
            self.events.passed(charge)
            outputs = await self._computed(images, charge)
        self.metrics.images.inc(len(images))
        return outputs

    async def _computed(self, images: NDArray[np.float32], charge: Charge) -> Outputs:
        """The outputs for images that were counted; where there are none, they are taken off the bill."""
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await self.batches(images)
        except BaseException as error:
            await asyncio.shield(self._in_ledger(self.keys.refund, charge))
            if isinstance(error, TimeoutError):
                raise Refusal(504, f"No answer within {self.limits.seconds:g} seconds; ask again later.") from None
            if isinstance(error, UndistillError):  # of the model behind a gateway, whose address is nobody's business
                note("upstream failed", logging.ERROR, why=legible(str(error)))
                raise Refusal(502, "The model behind this gateway does not answer as it should; ask later.") from None
            raise

    async def _in_ledger(self, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._ledger, work, *given)

    async def _body(self, request: Request) -> bytes:
        """The body, of limited size, within limited time."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "Compressed bodies are not taken.")
        content, size = [], 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for part in request.stream():
                    content.append(part)
                    size += len(part)
                    if size > self.limits.body:
                        raise Refusal(413, f"A body has at most {self.limits.body:,} bytes.")
        except TimeoutError:
            raise Refusal(408, f"The body did not arrive within {self.limits.seconds:g} seconds.") from None
        return b"".join(content)

    async def _picture(self, request: Request) -> bytes:
        kind = kind_of(request)
        if kind != "multipart/form-data":
            if kind and not kind.startswith("image/") and kind != "application/octet-stream":
                raise Refusal(415, "Send a picture as the body (image/png, ...), or as a file of a form.")
            return await self._body(request)
        return await file_of_form(request, await self._body(request))

    def _decoded(self, content: bytes) -> NDArray[np.float32]:
        """An encoded picture as an image (C, H, W)."""
        channels, height, width = self.served.shape
        try:
            pixels = decode_picture(content, channels, (width, height), self._reading)
        except TooManyPixels as error:
            raise Refusal(413, f"{error}.") from None
        except (DataError, MemoryError) as error:
            raise Refusal(400, str(error) or f"The picture cannot be read; {', '.join(FORMATS)} can.") from None
        return to_float(pixels).numpy()

    async def _no_such_place(self, request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            return complaint(405, "This place takes another method (GET or POST).", **(error.headers or {}))
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
        scope.setdefault("state", {})

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
            elif self.under_way > self.server.limits.requests:
                await complaint(503, "Too many requests are under way.", retry_after="1")(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except Exception:
            note("failed", logging.ERROR, traceback=True, request=own)
            if not status:
                sentence = f"The server failed; its log says why, under request {own}."
                await complaint(500, sentence)(scope, receive, sending)
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


async def gone(request: Request, error: ClientDisconnect) -> Response:
    return complaint(400, "The request broke off.")
