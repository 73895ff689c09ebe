"""Requests and answers of the Open Inference Protocol v2, as a server reads and writes them."""

import base64
import binascii
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from undistill.core.errors import legible, unknown
from undistill.core.files import parse_json
from undistill.serving.refusals import Refusal
from undistill.victims.protocols import HEADER, Message

INPUT = "images"
TYPES: Mapping[Any, str] = {np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}
CLOSE = 1e-3  # to the range from 0 to 1
LONGEST_ID = 200  # characters
DEEPEST = 5  # lists within each other

Images = NDArray[np.float32] | list[bytes]
"""Images (B, C, H, W) in [0, 1], or as many encoded pictures, of which none was decoded yet."""


class Inference(NamedTuple):
    """A request that was read."""

    images: Images
    id: str | None
    outputs: dict[str, bool]
    """The outputs that were asked for, and whether each is wanted in binary form."""


def read_inference(message: Message, *, shape: tuple[int, int, int], names: Sequence[str], most: int) -> Inference:
    """The images of a request, and what is wanted of them. Raises `Refusal`, with a sentence, for any other request.

    Args:
        message: its body and headers; what is after the JSON of a binary message are tensors.
        shape: channels, height and width of an image.
        names: the outputs that there are.
        most: images of one request.
    """
    length = message.headers.get(HEADER.lower())
    if length is not None and not (length.isdecimal() and len(length) < 12 and int(length) <= len(message.body)):
        raise Refusal(400, f"{HEADER} must be the length of the JSON with which the body begins.")
    end = len(message.body) if length is None else int(length)
    asked, raw = _object(message.body[:end]), message.body[end:]
    given = asked.get("inputs")
    if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], dict):
        raise Refusal(400, f"inputs must be a list of one tensor, '{INPUT}'.")
    images = _images(given[0], raw, shape, most)
    own = asked.get("id")
    if own is not None and not (isinstance(own, str) and len(own) <= LONGEST_ID):
        raise Refusal(400, f"id must be a text of at most {LONGEST_ID} characters.")
    return Inference(images, own, _wanted(asked, names))


def write_inference(
    outputs: Mapping[str, NDArray[Any]], wanted: Mapping[str, bool], *, model: str, version: str, own: str | None
) -> Message:
    """The answer, with those of the `outputs` that are `wanted`; `own` is the id of the request."""
    tensors, raw = [], b""
    for name, binary in wanted.items():
        array = outputs[name]
        tensor: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": TYPES[array.dtype]}
        if binary:
            content = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
            tensor["parameters"] = {"binary_data_size": len(content)}
            raw += content
        else:
            tensor["data"] = array.ravel().tolist()
        tensors.append(tensor)
    answer = {"model_name": model, "model_version": version, "outputs": tensors}
    head = json.dumps(answer if own is None else {**answer, "id": own}).encode()
    if not any(wanted.values()):
        return Message(head, {"content-type": "application/json"})
    return Message(head + raw, {"content-type": "application/octet-stream", HEADER.lower(): str(len(head))})


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = parse_json(body.decode())
    except ValueError as error:
        why = "no number but a finite one can be sent" if "holds the number" in str(error) else "it is no JSON"
        raise Refusal(400, f"The body cannot be read: {why}.") from None
    if not isinstance(found, dict):
        raise Refusal(400, "The body must be a JSON object with 'inputs'.")
    return found


def _images(tensor: dict[str, Any], raw: bytes, shape: tuple[int, int, int], most: int) -> Images:
    if tensor.get("name") != INPUT:
        raise Refusal(400, f"The input is called '{INPUT}', and not {_quoted(tensor.get('name'))}.")
    kind = tensor.get("datatype")
    if kind not in ("FP32", "BYTES"):
        raise Refusal(400, f"The datatype of {INPUT} is FP32, or BYTES for encoded pictures; not {_quoted(kind)}.")
    declared = _shape(tensor.get("shape"))
    if declared[0] > most:
        raise Refusal(413, f"{declared[0]:,} images were sent; a request may hold {most:,}.")
    binary = _parameters(tensor).get("binary_data_size")
    if binary is not None:
        if binary != len(raw) or isinstance(binary, bool):
            raise Refusal(400, f"binary_data_size is {_quoted(binary)}, and {len(raw):,} bytes follow the JSON.")
        if "data" in tensor:
            raise Refusal(400, "A tensor has either data or binary_data_size.")
    elif raw:
        raise Refusal(400, f"{len(raw):,} bytes follow the JSON, and no tensor names them by binary_data_size.")
    if kind == "BYTES":
        pictures = [*_lengths(raw)] if binary is not None else _base64(tensor.get("data"))
        if declared not in ((len(pictures),), (len(pictures), 1)):
            raise Refusal(400, f"The shape {list(declared)} was named, and {len(pictures)} pictures were sent.")
        return pictures
    if declared[1:] != shape:
        raise Refusal(400, f"Images are (B, {', '.join(map(str, shape))}), and not {_quoted(list(declared))}.")
    array = np.frombuffer(raw, "<f4") if binary is not None and len(raw) % 4 == 0 else None
    if binary is None:
        array = _numbers(tensor.get("data"), math.prod(declared))
    if array is None or array.size != math.prod(declared):
        raise Refusal(400, f"{INPUT} of shape {list(declared)} are {math.prod(declared):,} numbers of FP32.")
    images: NDArray[np.float32] = array.astype(np.float32, copy=False).reshape(declared)
    if not np.isfinite(images).all():
        raise Refusal(400, "An image holds NaN or infinity.")
    if images.min() < -CLOSE or images.max() > 1 + CLOSE:
        raise Refusal(400, f"Images have values from 0 to 1; these go from {images.min():.4g} to {images.max():.4g}.")
    return images


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise Refusal(400, "shape must be a list of whole numbers.")
    if any(type(one) is not int or not 0 < one < 2**31 for one in value):
        raise Refusal(400, f"shape must be whole numbers above 0, and not {_quoted(value)}.")
    return tuple(value)


def _numbers(data: Any, count: int) -> NDArray[np.float32] | None:
    """So many numbers in a flat or nested list; None for anything else, of which NumPy could make a huge array."""
    for _ in range(DEEPEST):
        if not isinstance(data, list) or len(data) > count:
            return None
        if not any(isinstance(one, list) for one in data):
            break
        if not all(isinstance(one, list) for one in data):
            return None
        data = [number for one in data for number in one]
    if len(data) != count or not {type(number) for number in data} <= {int, float}:
        return None
    try:
        return np.asarray(data, np.float32)
    except OverflowError:  # whole numbers may have any size
        return None


def _base64(data: Any) -> list[bytes]:
    if not isinstance(data, list) or not data or not all(isinstance(one, str) for one in data):
        raise Refusal(400, "Encoded pictures are sent as a list of base64 texts.")
    try:
        return [base64.b64decode(one, validate=True) for one in data]
    except (binascii.Error, ValueError):
        raise Refusal(400, "A picture is no base64 text.") from None


def _lengths(raw: bytes) -> Iterator[bytes]:
    """The parts of binary BYTES, each with its length in four bytes before it."""
    place = 0
    while place < len(raw):
        if place + 4 > len(raw):
            raise Refusal(400, "BYTES are parts with a length of four bytes before each.")
        (length,) = struct.unpack_from("<I", raw, place)
        place += 4
        if place + length > len(raw):
            raise Refusal(400, f"A part of {length:,} bytes was named, and {len(raw) - place:,} are there.")
        yield raw[place : place + length]
        place += length


def _wanted(asked: dict[str, Any], names: Sequence[str]) -> dict[str, bool]:
    """The outputs that are asked for, all by default, and whether each is wanted in binary form."""
    default = _parameters(asked).get("binary_data_output", False) is True
    outputs = asked.get("outputs")
    if outputs is None or outputs == []:
        return dict.fromkeys(names, default)
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs) or len(outputs) > len(names):
        raise Refusal(400, f"outputs must be a list of those that there are: {', '.join(names)}.")
    wanted = {}
    for output in outputs:
        name = output.get("name")
        if name not in names:
            raise Refusal(400, unknown("output", legible(str(name)[:60]), names))
        parameters = _parameters(output)
        if "classification" in parameters:
            raise Refusal(400, "The classification extension is not spoken here.")
        wanted[name] = parameters.get("binary_data", default) is True
    return wanted


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    found = value.get("parameters")
    if found is not None and not isinstance(found, dict):
        raise Refusal(400, "parameters must be a JSON object.")
    return found or {}


def _quoted(value: Any) -> str:
    text = json.dumps(value)
    return legible(text[:60]) + ("..." if len(text) > 60 else "")
