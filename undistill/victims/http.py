"""A server: `Http('http://127.0.0.1:8080')`, by one of four protocols."""

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import parse_qs, urlsplit, urlunsplit

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator
from torch import Tensor

from undistill.core.errors import VictimError, legible
from undistill.core.files import MIB, read_text, sha256
from undistill.victims.black_box import Ask, BlackBox, Outputs
from undistill.victims.protocols import Declared, HuggingFace, Instances, Message, OpenInference, Protocol, Shape

OptionalPath = Annotated[str, AfterValidator(lambda text: os.path.realpath(os.path.expanduser(text)) if text else "")]
TRIES = 6
"""Attempts at one request, with growing pauses between them."""
PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
BUSY = (429, 502, 503, 504)
"""Answers of a server that may do better later."""
LARGEST = 64 * MIB  # bytes of an answer
SECRETS = ("key", "token", "secret", "password", "passwd", "pwd", "sig", "signature", "auth", "code")
LOCAL = ("127.0.0.1", "localhost", "::1")


class Http(BlackBox):
    """A model behind HTTP. Its answers are bought: each image is asked once, and kept."""

    unnamed = "url"
    quiet = (
        *BlackBox.quiet,
        *("model", "layout", "binary", "result", "shape", "size", "parallel", "timeout", "token", "header"),
    )
    billed: ClassVar[bool] = True
    transport = ("binary", "size", "parallel", "timeout", "token", "header")
    withheld = ("url",)

    url: str = Field(max_length=2000)
    """Address of the server; with the protocols huggingface and json, of the very place that is asked."""
    protocol: Literal["oip-v2", "kserve-v1", "huggingface", "json"] = "oip-v2"
    """Open Inference Protocol v2; KServe v1 or TF Serving; image classification of Hugging Face; or a JSON of its own,
    declared in a file that `shape` names."""
    model: str = Field("model", pattern=r"^[\w.-]+(/versions/[\w.-]+)?$", max_length=200)
    """Name of the model on the server."""
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Where channels are in an image that is sent as numbers."""
    binary: bool | None = None
    """Whether tensors travel in binary form, far faster than JSON; with oip-v2, None asks the server if it can."""
    result: str = Field("", max_length=200)
    """Name of the output, with oip-v2; empty takes the first with a number for each image and class."""
    shape: OptionalPath = ""
    """YAML file that declares the JSON of the protocol json."""
    size: int = Field(64, ge=1, le=65_536)
    """The most images of one request."""
    parallel: int = Field(4, ge=1, le=256)
    """Requests that are under way side by side."""
    timeout: float = Field(30.0, gt=0, le=3600)
    """Seconds to wait for an answer."""
    token: str = Field("UNDISTILL_TOKEN", pattern=r"^\w+$")
    """Name of the environment variable that holds the token, if the server wants one. The token is never recorded."""
    header: str = Field("Authorization", pattern=r"^[\w-]+$")
    """Header in which the token is sent: as 'Bearer TOKEN' in Authorization, alone in any other."""

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, value: str) -> str:
        """The address is a key and a row of the report, and so may hold nothing that others must not read."""
        try:
            parts = urlsplit(value)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"it is no address ({error})") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("an address begins with http:// or https:// and a host")
        if parts.username is not None or parts.password is not None:
            raise ValueError("it holds a name or password, which would be recorded; put a token into UNDISTILL_TOKEN")
        fields = parse_qs(parts.query, keep_blank_values=True)
        if secret := [name for name in fields if any(word in name.casefold() for word in SECRETS)]:
            raise ValueError(f"'{secret[0]}' would be recorded; put it into the environment variable UNDISTILL_TOKEN")
        if any(values == [""] for values in fields.values()):
            raise ValueError("it holds something without a name, which may be a key; name it, or use UNDISTILL_TOKEN")
        if not value.isprintable() or " " in value:
            raise ValueError("it holds spaces or what cannot be printed")
        if parts.fragment:
            raise ValueError("what follows # is not sent; leave it out")
        return value.rstrip("/")

    def refers(self) -> dict[str, str]:
        if self.shape and not Path(self.shape).is_file():
            raise VictimError(f"There is no file {self.shape}.")
        return {self.shape: sha256(Path(self.shape), MIB)} if self.shape else {}

    def order(self, classes: Sequence[str]) -> tuple[int, ...]:
        """As of others; a server that answers by name may have names of its own, in the order of the data."""
        named = [name.strip() for name in self.classes.split(",")] if self.classes else []
        if self.protocol != "oip-v2" and len(set(named)) == len(classes) and not set(named) & set(classes):
            return tuple(range(len(classes)))
        return super().order(classes)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        single = self.protocol == "huggingface" or (self.protocol == "json" and self._declared.single)
        return 1 if single else self.size

    @property
    def workers(self) -> int:  # type: ignore[override]
        return self.parallel

    def connect(self, shape: tuple[int, int, int], classes: tuple[str, ...], lost: Callable[[int], None]) -> Ask:
        channel = Channel(self)
        named = tuple(name.strip() for name in self.classes.split(",")) if self.classes else classes
        protocol = self._protocol(channel, named)

        def ask(images: Tensor) -> Outputs:
            message = protocol.request(images)
            answer = channel.post(protocol.path, message, lambda: lost(len(images)))
            return protocol.outputs(answer, len(images))

        return ask

    def declared(self) -> str:
        if self.protocol != "oip-v2":
            return ""
        return json.dumps(self._metadata(Channel(self)), sort_keys=True)

    def _protocol(self, channel: "Channel", classes: tuple[str, ...]) -> Protocol:
        if self.protocol == "oip-v2":
            binary = self._takes_binary(channel) if self.binary is None else self.binary
            return OpenInference(
                self._metadata(channel),
                self.model,
                binary=binary,
                layout=self.layout,
                result=self.result,
                num_classes=len(classes),
            )
        if self.protocol == "kserve-v1":
            return Instances(self.model, classes, self.layout)
        if self.protocol == "huggingface":
            return HuggingFace(classes)
        return Declared(self._declared, classes, self.layout)

    def _metadata(self, channel: "Channel") -> Any:
        answer = channel.get(f"/v2/models/{self.model}")
        try:
            return json.loads(answer.body)
        except ValueError:
            raise VictimError(
                f"{self.url} does not speak the Open Inference Protocol: no JSON at /v2/models/{self.model}. Name "
                "another protocol: kserve-v1, huggingface or json."
            ) from None

    def _takes_binary(self, channel: "Channel") -> bool:
        """Whether the server names the binary tensor data extension among those that it has."""
        try:
            about = json.loads(channel.get("/v2").body)
        except (VictimError, ValueError):
            return False
        extensions = about.get("extensions") if isinstance(about, dict) else None
        return isinstance(extensions, list) and any("binary_tensor" in str(name) for name in extensions)

    @property
    def _declared(self) -> Shape:
        if not self.shape:
            raise VictimError("The protocol json needs a file that declares it: shape='api.yaml'.")
        try:
            return Shape.model_validate(yaml.safe_load(read_text(Path(self.shape), MIB)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise VictimError(f"{self.shape}: {where}: {first['msg']}; see docs/black-boxes.md.") from None
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise VictimError(f"{self.shape} is no YAML: {' '.join(str(error).split())[:200]}") from None


class Channel:
    """Requests to one server: with its token, verified, tried again while it is busy, and never beyond a size."""

    def __init__(self, box: Http) -> None:
        self.box = box
        self._token = os.environ.get(box.token, "").strip()
        if not (self._token.isascii() and self._token.isprintable()):
            raise VictimError(f"The token in {box.token} holds what no header can; look at that variable.")
        parts = urlsplit(box.url)
        self._local = parts.hostname in LOCAL
        if self._token and parts.scheme == "http" and not self._local:
            raise VictimError(f"{box.url} is not encrypted, so that anybody could read the token; use https.")

    @cached_property
    def _client(self) -> Any:
        try:
            import httpx2
        except ImportError:
            raise VictimError("A server needs httpx2: pip install 'undistill[http]'.") from None
        limits = httpx2.Limits(max_connections=self.box.parallel)
        # no redirects: the token, and images, go to the address that was named and to no other
        return httpx2.Client(timeout=self.box.timeout, limits=limits, trust_env=not self._local, follow_redirects=False)

    def get(self, path: str) -> Message:
        return self._patiently("GET", path, None, lambda: None)

    def post(self, path: str, message: Message, lost: Callable[[], None]) -> Message:
        """The answer; `lost` is called for each attempt that may have been answered and did not arrive."""
        return self._patiently("POST", path, message, lost)

    def _patiently(self, method: str, path: str, message: Message | None, lost: Callable[[], None]) -> Message:
        import httpx2

        why = ""
        for attempt in range(TRIES):
            wait = min(PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                status, answer = self._once(method, path, message)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                why = f"cannot be reached ({_reason(error)})"
            except httpx2.TimeoutException:
                lost()
                why = f"did not answer within {self.box.timeout:g} seconds"
            except httpx2.RequestError as error:
                lost()
                why = f"broke off ({_reason(error)})"
            else:
                if status < 300:
                    return answer
                if status not in BUSY:
                    raise VictimError(self._refusal(status, path, answer))
                why = f"is busy (status {status})"
                wait = _asked_pause(answer.headers) or wait
            if attempt + 1 < TRIES:
                time.sleep(min(wait, LONGEST_PAUSE))
        raise VictimError(
            f"{self.box.url} {why}, {TRIES} times. What was answered is kept; the same command goes on from there."
        )

    def _once(self, method: str, path: str, message: Message | None) -> tuple[int, Message]:
        headers = dict(message.headers) if message else {}
        if self._token:
            bearer = self.box.header.casefold() == "authorization"
            headers[self.box.header] = f"Bearer {self._token}" if bearer else self._token
        body = message.body if message else None
        parts = urlsplit(self.box.url)
        address = urlunsplit(parts._replace(path=parts.path.rstrip("/") + path))
        with self._client.stream(method, address, content=body, headers=headers) as answer:
            content, size = [], 0
            for part in answer.iter_bytes():
                content.append(part)
                size += len(part)
                if size > LARGEST:
                    raise VictimError(f"{self.box.url} answered more than {LARGEST // MIB} MiB; ask for fewer at once.")
            named = {name.lower(): self._hidden(value) for name, value in answer.headers.items()}
            whole = b"".join(content)
            if self._token:  # a server may say what it was told
                whole = whole.replace(self._token.encode(), b"...")
            return answer.status_code, Message(whole, named)

    def _hidden(self, text: str) -> str:
        return text.replace(self._token, "...") if self._token else text

    def _refusal(self, status: int, path: str, answer: Message) -> str:
        said = legible(" ".join(answer.body[:300].decode(errors="replace").split()))
        where = f"{self.box.url}{path}"
        if status == 401 or (status == 403 and not self._token):
            given = (
                f"the token in {self.box.token} was refused" if self._token else f"put a token into {self.box.token}"
            )
            return f"{where} refuses access (status {status}): {given}. It said: {said}"
        if 300 <= status < 400:
            return (
                f"{where} leads elsewhere (status {status}: {legible(answer.headers.get('location', ''))}); name that."
            )
        if status == 404:
            return (
                f"{where} is not there (status 404); look at the address, the protocol and the model. It said: {said}"
            )
        return f"{where} refuses the question (status {status}). It said: {said}"


def _asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that a busy server asks for."""
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() and float(text) > 0 else None


def _reason(error: Exception) -> str:
    return legible(str(error).strip().splitlines()[0][:200]) if str(error).strip() else type(error).__name__
