"""A file of ONNX: `Onnx('model.onnx')`, run by onnxruntime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from undistill.core.errors import VictimError
from undistill.core.files import sha256
from undistill.data.source import ResolvedPath
from undistill.victims.black_box import Ask, BlackBox, Outputs
from undistill.victims.function import outputs_of
from undistill.victims.protocols import levels

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
LARGEST = 2**34  # bytes of a file
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


class Onnx(BlackBox):
    """A network in a file of any opset that onnxruntime runs. It is asked and not opened."""

    unnamed: ClassVar[str] = "path"
    path: ResolvedPath
    input: str = ""
    """Name of its input; empty where there is one."""
    result: str = ""
    """Name of its output; empty takes the first that has a number for each image and class."""
    layout: Literal["auto", "NCHW", "NHWC"] = "auto"
    """Place of the channels in its input; `auto` reads it from the shape."""

    def refers(self) -> dict[str, str]:
        path = Path(self.path)
        if not path.is_file():
            raise VictimError(f"There is no file {self.path}.")
        return {self.path: sha256(path, LARGEST)}

    def connect(self, shape: tuple[int, int, int], classes: tuple[str, ...], lost: Callable[[int], None]) -> Ask:
        self.refers()
        session = session_of(self.path)
        taken = _one(session.get_inputs(), self.input, "input")
        if taken.type not in TYPES:
            raise VictimError(f"{self.path}: the input {taken.name} is {taken.type}; images are {', '.join(TYPES)}.")
        last = self._channels_last(taken.shape, shape)
        dtype, fixed = TYPES[taken.type], taken.shape[0] if isinstance(taken.shape[0], int) else None
        names = [self.result] if self.result else [one.name for one in session.get_outputs()]
        if self.result:
            _one(session.get_outputs(), self.result, "output")

        def run(images: Tensor) -> Outputs:
            images = images.permute(0, 2, 3, 1) if last else images
            array = levels(images).numpy() if dtype is np.uint8 else images.numpy()
            try:
                found = session.run(names, {taken.name: np.ascontiguousarray(array.astype(dtype))})
            except Exception as error:  # of many kinds, all of onnxruntime
                raise VictimError(f"{self.path} failed on images {tuple(array.shape)}: {first_line(error)}") from None
            chosen = self._chosen(found, len(images), len(classes))
            named = dict(zip(names, found, strict=True)).get("classes")  # of the highest ones, as exports give them
            if named is not None and named is not chosen and (named.dtype.kind, named.shape) == ("i", chosen.shape):
                return Outputs(torch.from_numpy(chosen.astype(np.float64)), torch.from_numpy(named.astype(np.int64)))
            return outputs_of(chosen)

        def ask(images: Tensor) -> Outputs:
            if fixed is None:
                return run(images)
            values, named = zip(*(run(_padded(part, fixed)) for part in images.split(fixed)), strict=True)
            whole = (None if column[0] is None else torch.cat(column)[: len(images)] for column in (values, named))
            return Outputs(*whole)

        return ask

    def _channels_last(self, wanted: list[Any], shape: tuple[int, int, int]) -> bool:
        """Whether channels come last; `VictimError` where images of this shape do not fit the input's."""
        if len(wanted) != 4:
            raise VictimError(f"{self.path} takes an input of shape {wanted}; images have four dimensions.")
        channels, height, width = shape
        layouts = {"NCHW": (channels, height, width), "NHWC": (height, width, channels)}
        fitting = [
            name
            for name, own in layouts.items()
            if all(size == mine for size, mine in zip(wanted[1:], own, strict=True) if isinstance(size, int))
        ]
        if self.layout not in ("auto", *fitting) or not fitting:
            raise VictimError(
                f"{self.path} takes images {wanted[1:]}, and the data has {channels} channels of {height} x {width} "
                "pixels; name the data in the size that it wants, such as Folder(path=..., size=224)."
            )
        return (self.layout if self.layout != "auto" else fitting[0]) == "NHWC"

    def _chosen(self, found: list[Any], count: int, num_classes: int) -> Any:
        """The named output, or the first with numbers (B, K), best for as many classes as there are."""
        if self.result:
            return found[0]
        for one in sorted(found, key=lambda one: getattr(one, "shape", ())[1:] != (num_classes,)):
            if isinstance(one, np.ndarray) and one.ndim == 2 and len(one) == count and one.dtype.kind == "f":
                return one
        return found[0]


def session_of(path: str) -> Any:
    """A session of onnxruntime, without custom operators; `VictimError` for a file that it cannot run."""
    try:
        import onnxruntime
    except ImportError:
        raise VictimError("An ONNX file needs onnxruntime: pip install 'undistill[onnx]'.") from None
    providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, too
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:
        raise VictimError(
            f"{path} cannot be run by onnxruntime {onnxruntime.__version__}: {first_line(error)}. Custom operators "
            "are not loaded, since that would run a stranger's code."
        ) from None


def _one(values: list[Any], name: str, what: str) -> Any:
    """The input or output of that name, or the only one."""
    named = {value.name: value for value in values}
    if name and name not in named:
        raise VictimError(f"The file has no {what} '{name}'; it has {', '.join(named)}.")
    if not name and len(named) != 1:
        raise VictimError(f"The file has the {what}s {', '.join(named)}; name the one for images, {what}='...'.")
    return named[name] if name else values[0]


def _padded(images: Tensor, size: int) -> Tensor:
    """Images for a file that takes exactly `size` of them: the last one again and again."""
    return torch.cat([images, images[-1:].expand(size - len(images), -1, -1, -1)]) if len(images) < size else images


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300].rstrip(".") if str(error).strip() else type(error).__name__
