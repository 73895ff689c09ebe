"""Run folders: claimed with a request, finished with a record, read back without executing anything.

request.json          what was asked for, written first; the same request resumes or is instant
engine-KEY.json       a measured trial of precision, layout and compilation, and what it chose
answers/              what the network answered to views, for later commands; may be removed at any time
checkpoint-N.pt       the N-th training of the run so far; gone once it is finished
metrics.jsonl         every epoch
weights.safetensors   the result
run.json              specs, parents, seed, metrics, versions, the weights' hash; written last
"""

import json
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

import undistill
from undistill import distributed
from undistill.code import core_sha256, is_code
from undistill.data import Data, Source
from undistill.engine import TRIAL_LOCK
from undistill.errors import NonFinite, StoreError, UndistillError
from undistill.files import PART, parse_json, read_json, read_text, require_plain, sha256, sweep, write_json
from undistill.models import Model, device_of, largest_weights, load_weights
from undistill.states import write_weights

Record = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A folder that this process alone may write into."""

    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / "run.json").exists()

    def give_up(self) -> None:
        """Free the folder of a run that cannot succeed, unless something in it is worth keeping."""
        if distributed.rank() > 0:
            return
        self._clear_checkpoints()
        names = ("engine-*.json", TRIAL_LOCK, "metrics.jsonl", "request.json")
        small = [path for name in names for path in self.folder.glob(name)]
        if set(self.folder.iterdir()) <= {self.folder / ".lock", *small}:
            for path in small:
                path.unlink(missing_ok=True)

    def finish(self, network: nn.Module, record: Record) -> None:
        """Write weights, then the record, then clear the checkpoints away."""
        if distributed.rank() > 0:
            return
        hashes = {"weights_sha256": write_weights(self.folder / "weights.safetensors", network.state_dict())}
        if (metrics := self.folder / "metrics.jsonl").exists():
            hashes["metrics_sha256"] = sha256(metrics)
        write_json(self.folder / "run.json", record | hashes | {"environment": environment(device_of(network))})
        self._clear_checkpoints()

    def _clear_checkpoints(self) -> None:
        for checkpoint in self.folder.glob("checkpoint-*.pt"):
            checkpoint.unlink()


@contextmanager
def claim(folder: Path, request: Record) -> Iterator[Claim]:
    """Make `folder` the place of `request`, or take up the same request where it stopped.

    Raises `StoreError` for a folder that holds anything else, or in which another process works. Of processes
    that train together the first claims for all, and all raise what it raises.
    """
    request = json.loads(json.dumps(request))
    with ExitStack() as stack:
        refused: Exception | None = None
        if distributed.rank() == 0:
            try:
                stack.enter_context(_take(folder, request))
            except (UndistillError, OSError) as error:
                refused = error
        if refused := distributed.from_first(refused):
            raise refused
        if not distributed.everywhere(read_json(folder / "request.json") == request):
            raise StoreError(f"{folder} is not one folder for all processes; torchrun needs an --out that they share.")
        place = Claim(folder)
        try:
            yield place
        except NonFinite:
            place.give_up()
            raise
        distributed.barrier()  # the first process has finished it by then


def _take(folder: Path, request: Record) -> FileLock:
    """The lock of `folder`, which now holds `request`; `StoreError` if it is not to be had."""
    path = folder / "request.json"
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    others = [held for held in folder.iterdir() if held.name != ".lock" and not PART.fullmatch(held.name)]
    if others and not path.exists():
        raise StoreError(f"{folder} holds files that are no run of undistill; choose another --out.")
    require_plain(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(f"Another process is working in {folder}; wait for it, or choose another --out.") from None
    try:
        _sweep_below(folder)
        if not path.exists():
            write_json(path, request)
        elif (held := _read_json(path)) != request:
            field, there, asked = difference(held, request)
            raise StoreError(
                f"{folder} holds another run ({field} is {there!s:.300} there, {asked!s:.300} was asked). "
                "Choose another --out, or remove that folder."
            )
    except BaseException:
        lock.release()
        raise
    return lock


def _sweep_below(folder: Path) -> None:
    """Remove what killed processes left in a folder, but for parts of it that have a lock of their own."""
    sweep(folder)
    for path in folder.iterdir():
        if path.is_dir() and path.name != "answers" and not (path / ".lock").exists():
            _sweep_below(path)


Finite = Annotated[float, Field(ge=-1e18, le=1e18, allow_inf_nan=False)]


class Metrics(BaseModel):
    """What is known of a finished network; more may be recorded."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Finite]

    validation_accuracy: float = Field(ge=0, le=1)


class Parent(BaseModel):
    """The honest teacher from which a network was protected, as a path from the run's folder."""

    folder: str
    weights_sha256: str


class Recorded(BaseModel):
    """What every run.json must hold, whatever else it says."""

    command: Literal["train", "protect"]
    data: str
    data_sha256: str
    model: str
    defence: str | None = None
    parent: Parent | None = None
    start_sha256: str | None = None
    classes: list[str] = Field(min_length=2)
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    refers: dict[str, str]
    settings: dict[str, Any]
    metrics: Metrics
    seconds: Annotated[Finite, Field(ge=0)]
    weights_sha256: str
    metrics_sha256: str | None = None
    environment: dict[str, str | int] = Field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished training: who it is, on what, and its weights."""

    folder: Path
    record: Record

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Raises `StoreError` where there is no finished run."""
        folder = Path(folder)
        if not folder.is_dir():
            raise StoreError(f"There is no run folder {folder}.")
        if not (folder / "run.json").exists():
            raise StoreError(f"{folder} is {_unfinished(folder)}.")
        require_plain(folder)
        record = _read_json(folder / "run.json")
        try:
            Recorded.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise StoreError(
                f"{folder / 'run.json'} is damaged: {field}: {first['msg']}; make the run again."
            ) from None
        return cls(folder, record)

    def data(self) -> Data:
        """The run's data, read again and checked to be the same."""
        data = Source.parse(self.record["data"]).load()
        if data.digest != self.record["data_sha256"]:
            raise StoreError(
                f"{self.record['data']} no longer holds the images on which {self.folder} was made; "
                "restore them, or train again into a new folder."
            )
        self.require(data.shape, data.classes)
        return data

    def network(self, model: Model | None = None) -> nn.Module:
        """The trained network, in eval mode. `model` overrides the recorded one (needed for the user's own code)."""
        path, network = self.folder / "weights.safetensors", self.fresh(0, model)
        if not path.exists() or sha256(path, largest_weights(network)) != self.record["weights_sha256"]:
            raise StoreError(
                f"{path} is missing or not the file that this run wrote; remove {self.folder} and make the run again."
            )
        load_weights(network, path)
        return network

    def fresh(self, seed: int, model: Model | None = None) -> nn.Module:
        """The same architecture, newly initialised by `seed`."""
        spec = self.model(model)
        if changed := set(spec.refers().values()) - set(self.record["refers"].values()):
            raise StoreError(
                f"The code of {spec} has changed since {self.folder} was made (SHA-256 now {min(changed)[:12]}...); "
                "restore it, or make the run again with another --out."
            )
        return spec.build(self.shape, len(self.record["classes"]), seed).eval()

    def model(self, override: Model | None = None) -> Model:
        """The recorded network; `override` names it again where it is the user's own code."""
        recorded = str(self.record["model"])
        return override if override and is_code(recorded) else Model.parse(recorded)

    def require(self, shape: tuple[int, ...], classes: Sequence[str]) -> None:
        """Raise `StoreError` unless the run's network is one for these images and classes."""
        own = (self.shape, tuple(self.record["classes"]))
        if own != (tuple(shape), tuple(classes)):
            raise StoreError(
                f"{self.folder} is for images {own[0]} and {len(own[1])} classes; "
                f"{tuple(shape)} and {len(classes)} are needed."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.record["shape"]
        return channels, height, width

    @property
    def digest(self) -> str:
        return str(self.record["weights_sha256"])


def environment(device: torch.device) -> Record:
    """Versions and hardware, for the record."""
    return {
        "undistill": undistill.__version__,
        "code": core_sha256()[:8],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.system(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def described(environment: Record) -> str:
    """The part of it on which bits depend, in one line."""
    known = defaultdict(lambda: "?", environment)
    return "undistill {undistill} (code {code}), torch {torch}, {device}, {threads} threads".format_map(known)


def _unfinished(folder: Path) -> str:
    """What a folder without run.json is."""
    if not (folder / "request.json").exists():
        return "no run of undistill"
    command = _read_json(folder / "request.json").get("command")
    if command in ("train", "protect"):
        return "unfinished: run the command that made it again"
    return f"the folder of another command ({command}), not of a model"


def _read_json(path: Path) -> Record:
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore or remove its folder.") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged (no JSON object); restore or remove its folder.")
    return value


def difference(one: Record, other: Record, prefix: str = "") -> tuple[str, object, object]:
    """The first field in which two requests differ, and what it is in each."""
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return difference(a, b, f"{prefix}{name}.")
        if a != b:
            return f"{prefix}{name}", a, b
    raise AssertionError("called on equal requests")
