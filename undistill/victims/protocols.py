"""How images are put to a server, and what it answered is read: four protocols, each without a network in it."""

import base64
import io
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from undistill.core.errors import VictimError, legible
from undistill.core.files import parse_json
from undistill.victims.black_box import Outputs

HEADER = "Inference-Header-Content-Length"
"""Where the JSON of a binary message ends (Open Inference Protocol, binary tensor data extension)."""
NUMBERS: Mapping[str, Any] = {
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}
CLOSE = 1e-3  # to the range from 0 to 1
QUOTED = 200  # characters of an answer in an error

Layout = Literal["NCHW", "NHWC"]


class Message(NamedTuple):
    """The body of a request or of an answer, and its headers in lower case."""

    body: bytes
    headers: Mapping[str, str]


class Protocol(ABC):
    """One way to ask a server. `path` follows the address that the user named."""

    path: str = ""

    @abstractmethod
    def request(self, images: Tensor) -> Message:
        """A question about images (B, C, H, W), already normalised."""

    @abstractmethod
    def outputs(self, answer: Message, count: int) -> Outputs:
        """The answer to `count` images. Raises `VictimError` for what is none."""


class OpenInference(Protocol):
    """Open Inference Protocol v2, with binary tensors where the server takes them."""

    def __init__(
        self, metadata: Any, model: str, *, binary: bool, layout: Layout, result: str, num_classes: int
    ) -> None:
        """`metadata` is what the server says of the model: its inputs and outputs by name, shape and type."""
        inputs, outputs = (_described(metadata, kind) for kind in ("inputs", "outputs"))
        if len(inputs) != 1:
            raise VictimError(f"The model takes {len(inputs)} inputs; one for images is needed.")
        (self.input, (self.type, _)), self.result = next(iter(inputs.items())), result
        if self.type not in ("FP32", "FP64", "FP16", "UINT8", "BYTES"):
            raise VictimError(f"The model takes {self.type}; images are sent as FP32, FP16, FP64, UINT8 or BYTES.")
        if result and outputs and result not in outputs:
            raise VictimError(f"The model has no output '{result}'; it has {', '.join(outputs)}.")
        self.num_classes = num_classes
        self.binary, self.layout, self.path = binary, layout, f"/v2/models/{model}/infer"

    def request(self, images: Tensor) -> Message:
        if self.type == "BYTES":
            content = [png(image) for image in images]
            data: Any = [base64.b64encode(one).decode() for one in content]
            raw, shape = b"".join(struct.pack("<I", len(one)) + one for one in content), [len(images)]
        else:
            array = laid_out(images, self.layout, scale=self.type == "UINT8").astype(NUMBERS[self.type])
            data, raw, shape = None, array.tobytes(), list(array.shape)
            if not self.binary:
                data = array.ravel().tolist()
        tensor: dict[str, Any] = {"name": self.input, "shape": shape, "datatype": self.type}
        asked: dict[str, Any] = {"inputs": [tensor]}
        if self.result:
            asked["outputs"] = [{"name": self.result}]
        if not self.binary:
            tensor["data"] = data
            return Message(json.dumps(asked).encode(), {"content-type": "application/json"})
        tensor["parameters"] = {"binary_data_size": len(raw)}
        asked["parameters"] = {"binary_data_output": True}
        head = json.dumps(asked).encode()
        headers = {"content-type": "application/octet-stream", HEADER.lower(): str(len(head))}
        return Message(head + raw, headers)

    def outputs(self, answer: Message, count: int) -> Outputs:
        length = answer.headers.get(HEADER.lower(), "")
        end = int(length) if length.isdecimal() else len(answer.body)
        tensors = dict(_tensors(_json(answer.body[:end]), answer.body[end:]))
        if self.result:
            if self.result not in tensors:
                raise VictimError(f"The server left out the output '{self.result}'; it gave {', '.join(tensors)}.")
            return _of_array(tensors[self.result], tensors.get("classes") if self.result != "classes" else None)
        for array in sorted(tensors.values(), key=lambda one: one.shape[1:] != (self.num_classes,)):
            if array.ndim == 2 and array.dtype.kind == "f" and len(array) == count:
                return _of_array(array, tensors.get("classes"))
        if not tensors:
            raise VictimError("The server gave no output that can be read as numbers.")
        return _of_array(next(iter(tensors.values())), None)


class Instances(Protocol):
    """KServe v1 and TF Serving: `instances` in, `predictions` out."""

    def __init__(self, model: str, classes: Sequence[str], layout: Layout) -> None:
        self.classes, self.layout, self.path = classes, layout, f"/v1/models/{model}:predict"

    def request(self, images: Tensor) -> Message:
        return _json_message({"instances": laid_out(images, self.layout).tolist()})

    def outputs(self, answer: Message, count: int) -> Outputs:
        found = _json(answer.body)
        if not isinstance(found, dict) or "predictions" not in found:
            raise VictimError(f"The server gave no predictions: {_quoted(found)}.")
        return rows(found["predictions"], self.classes)


class HuggingFace(Protocol):
    """Image classification of Hugging Face: one image in, labels with scores out."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes

    def request(self, images: Tensor) -> Message:
        encoded = base64.b64encode(png(images[0])).decode()
        return _json_message({"inputs": encoded, "parameters": {"top_k": len(self.classes)}})

    def outputs(self, answer: Message, count: int) -> Outputs:
        return rows([_json(answer.body)], self.classes)


class Shape(BaseModel):
    """The shape of a JSON interface, as a small YAML file declares it.

    request: any JSON, in which the text '$images' stands for all images of a request, or '$image' for one
    image: tensor (nested lists), or png (base64 text)
    answer: where the answers lie, as names and places separated by points, such as result.scores
    """

    model_config = ConfigDict(extra="forbid")

    request: Any
    image: Literal["tensor", "png"] = "tensor"
    answer: str = ""

    @property
    def single(self) -> bool:
        """Whether a request asks about one image."""
        return "$images" not in json.dumps(self.request)


class Declared(Protocol):
    """A JSON interface of somebody's own."""

    def __init__(self, shape: Shape, classes: Sequence[str], layout: Layout) -> None:
        self.shape, self.classes, self.layout = shape, classes, layout
        if not any(name in json.dumps(shape.request) for name in ("$images", "$image")):
            raise VictimError("The request names no place for images; write '$images', or '$image' for one of them.")

    def request(self, images: Tensor) -> Message:
        if self.shape.image == "png":
            sent: list[Any] = [base64.b64encode(png(image)).decode() for image in images]
        else:
            sent = laid_out(images, self.layout).tolist()
        return _json_message(_filled_in(self.shape.request, {"$images": sent, "$image": sent[0]}))

    def outputs(self, answer: Message, count: int) -> Outputs:
        found = _json(answer.body)
        for name in filter(None, self.shape.answer.split(".")):
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (KeyError, IndexError, TypeError, ValueError):
                raise VictimError(f"The answer has no '{self.shape.answer}': {_quoted(found)}.") from None
        return rows([found] if self.shape.single else found, self.classes)


def rows(found: Any, classes: Sequence[str]) -> Outputs:
    """Answers to several images as servers write them, each one of:

    numbers for all classes; a class as a number or by name; scores by name; a list of names with scores.
    """
    if not isinstance(found, list) or not found:
        raise VictimError(f"The server gave no list of answers: {_quoted(found)}.")
    try:
        if all(isinstance(row, list) and row and all(_is_number(one) for one in row) for row in found):
            return _of_array(np.asarray(found, np.float64), None)
        if all(isinstance(row, str) or (isinstance(row, int) and not isinstance(row, bool)) for row in found):
            return Outputs(None, torch.tensor([[_place(row, classes)] for row in found]))
        scored = [_scores(row) for row in found]
        values = torch.tensor([list(row.values()) for row in scored], dtype=torch.float64)
        places = torch.tensor([[_place(name, classes) for name in row] for row in scored])
    except ValueError:
        raise VictimError(f"Not every image got as many numbers: {_quoted(found)}.") from None
    if places.shape[1] < len(classes):
        return Outputs(values, places)
    return Outputs(torch.empty_like(values).scatter(1, places, values))


def _scores(row: Any) -> Mapping[str, float]:
    """Scores by name, the highest first."""
    if isinstance(row, list) and row and all(isinstance(one, dict) and {"label", "score"} <= one.keys() for one in row):
        row = {str(one["label"]): one["score"] for one in row}
    if isinstance(row, dict) and row and all(_is_number(value) for value in row.values()):
        return dict(sorted(row.items(), key=lambda item: -item[1]))
    raise VictimError(f"The server answered {_quoted(row)}; scores of classes, or a class, are needed.")


def _place(name: str | int, classes: Sequence[str]) -> int:
    if isinstance(name, int):
        return name
    if name not in classes:
        raise VictimError(
            f"The server names the class '{legible(name):.60}', and the data has {', '.join(classes[:5])}; give its "
            "classes their names: classes='first,second,...'."
        )
    return list(classes).index(name)


def laid_out(images: Tensor, layout: Layout, *, scale: bool = False) -> NDArray[np.float32]:
    """Images as an array in that layout; `scale` brings them to the levels 0 to 255."""
    images = levels(images) if scale else images
    return np.ascontiguousarray((images.permute(0, 2, 3, 1) if layout == "NHWC" else images).float().numpy())


def levels(images: Tensor) -> Tensor:
    """Images in 256 levels, 0 to 255. Raises `VictimError` for normalised ones, which have others."""
    if images.min() < -CLOSE or images.max() > 1 + CLOSE:
        raise VictimError("The black box takes pictures, which cannot be normalised before; leave out preprocess.")
    return (images * 255).round().clamp(0, 255)


def png(image: Tensor) -> bytes:
    """One image (C, H, W) in [0, 1], in 256 levels, without loss."""
    pixels = levels(image).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _of_array(array: NDArray[Any], classes: NDArray[Any] | None) -> Outputs:
    """Numbers (B, K), with their `classes` (B, k) where the server names them; or labels (B,) or (B, 1)."""
    if array.dtype.kind in "iu" and (array.ndim == 1 or array.shape[1:] == (1,)):
        return Outputs(None, torch.from_numpy(array.astype(np.int64)).reshape(len(array), 1))
    named = None
    if classes is not None and classes.shape == array.shape:  # others say something else, such as the top class
        named = torch.from_numpy(classes.astype(np.int64))
    return Outputs(torch.from_numpy(array.astype(np.float64)), named)


def _tensors(found: Any, raw: bytes) -> Iterator[tuple[str, NDArray[Any]]]:
    """The outputs of an answer by name, but for text."""
    if not isinstance(found, dict) or not isinstance(found.get("outputs"), list):
        raise VictimError(f"The server gave no outputs: {_quoted(found)}.")
    try:
        for tensor in found["outputs"]:
            dtype, size = NUMBERS.get(tensor["datatype"]), (tensor.get("parameters") or {}).get("binary_data_size")
            own, raw = (raw[:size], raw[size:]) if size is not None else (b"", raw)
            if dtype is None:
                continue
            shape = [int(length) for length in tensor["shape"]]
            values = (
                np.asarray(tensor["data"]) if size is None else np.frombuffer(own, np.dtype(dtype).newbyteorder("<"))
            )
            yield str(tensor["name"]), values.astype(dtype).reshape(shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VictimError(f"The server gave outputs that cannot be read ({type(error).__name__}: {error}).") from None


def _described(metadata: Any, kind: str) -> dict[str, tuple[str, Any]]:
    """Type and shape of the inputs or outputs of a model, by name."""
    try:
        return {str(one["name"]): (str(one["datatype"]), one.get("shape")) for one in metadata.get(kind) or ()}
    except (KeyError, TypeError, AttributeError):
        raise VictimError(
            f"The server describes its model in a way that cannot be read: {_quoted(metadata)}."
        ) from None


def _json(body: bytes) -> Any:
    try:
        return parse_json(body.decode())
    except ValueError as error:
        if "it holds the number" in str(error):
            raise VictimError("The black box answers NaN or infinity; whoever runs it has to mend that.") from None
        raise VictimError(
            f"The server answered what is no JSON: {_quoted(body[:QUOTED].decode(errors='replace'))}."
        ) from None


def _json_message(value: Any) -> Message:
    return Message(json.dumps(value).encode(), {"content-type": "application/json"})


def _filled_in(template: Any, values: Mapping[str, Any]) -> Any:
    """The template with each value in the place of its name."""
    if isinstance(template, dict):
        return {name: _filled_in(held, values) for name, held in template.items()}
    if isinstance(template, list):
        return [_filled_in(held, values) for held in template]
    if not isinstance(template, str) or template in values:
        return values.get(template, template) if isinstance(template, str) else template
    if "$image" in template and isinstance(values["$image"], str):  # such as data:image/png;base64,$image
        return template.replace("$image", values["$image"])
    return template


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return legible(text[:QUOTED]) + ("..." if len(text) > QUOTED else "")
