"""Run folders: one process at a time claims one, and the same request finds it again.

run.py says which files lie in one.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from torch import nn

from undistill.core import distributed
from undistill.core.code import is_code, is_current
from undistill.core.errors import DataError, NonFinite, StoreError, UndistillError
from undistill.core.files import PART, parse_json, read_json, read_text, require_plain, sha256, sweep, write_json
from undistill.core.tensors import write_weights
from undistill.data.split import Samples
from undistill.data.views import to_float
from undistill.models.trial import device_of, require_as_measured
from undistill.models.weights import load_weights
from undistill.runs.environment import environment
from undistill.training.autotune import TRIAL_LOCK

Record = dict[str, Any]
COMPARED = 64  # images whose answers are compared with those of the network that was measured


class OnRecord(Protocol):
    """A run, or a black box that was contacted."""

    @property
    def folder(self) -> Path: ...

    @property
    def record(self) -> Record: ...


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
        names = ("autotune-*.json", TRIAL_LOCK, "metrics.jsonl", "request.json")
        small = [path for name in names for path in self.folder.glob(name)]
        if set(self.folder.iterdir()) <= {self.folder / ".lock", *small}:
            for path in small:
                path.unlink(missing_ok=True)

    def finish(self, network: nn.Module, record: Record, again: nn.Module, samples: Samples) -> None:
        """Write weights, then the record, then clear the checkpoints away.

        The weights are read into `again`, a new network of the same kind, which must answer `samples` as `network`
        does.
        """
        if distributed.rank() > 0:
            return
        weights = self.folder / "weights.safetensors"
        hashes = {"weights_sha256": write_weights(weights, network.state_dict())}
        load_weights(again, weights)
        images = to_float(samples[torch.arange(min(len(samples), COMPARED))].pixels.to(device_of(network)))
        require_as_measured(network, again, images, str(record["model"]))
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
        if refused := distributed.broadcast(refused):
            raise refused
        if not distributed.all_true(read_json(folder / "request.json") == request):
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
        sweep_below(folder)
        if not path.exists():
            write_json(path, request)
        elif (held := _as_asked_now(read_record(path), request)) != request:
            field, there, asked = difference(held, request)
            raise StoreError(
                f"{folder} holds another run ({field} is {there!s:.300} there, {asked!s:.300} was asked). "
                "Name another folder, or remove that one."
            )
        elif read_json(path) != request:
            write_json(path, request)  # in the words of today
    except BaseException:
        lock.release()
        raise
    return lock


def _as_asked_now(held: Record, request: Record) -> Record:
    """A recorded request, with the hashes of today for the user's code where that has not changed."""
    wanted, recorded = request.get("refers", {}), held.get("refers")
    if not isinstance(recorded, dict):
        return held
    refers = {
        name: wanted[name] if name in wanted and is_code(name) and is_current(name, sha) else sha
        for name, sha in recorded.items()
    }
    return held | {"refers": refers}


def sweep_below(folder: Path) -> None:
    """Remove what killed processes left in a folder, but for parts of it that have a lock of their own."""
    sweep(folder)
    for path in folder.iterdir():
        if path.is_dir() and path.name != "answers" and not (path / ".lock").exists():
            sweep_below(path)


def difference(one: Record, other: Record, prefix: str = "") -> tuple[str, object, object]:
    """The first field in which two requests differ, and what it is in each."""
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return difference(a, b, f"{prefix}{name}.")
        if a != b:
            return f"{prefix}{name}", a, b
    raise AssertionError("called on equal requests")


def read_record(path: Path) -> Record:
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore or remove its folder.") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged (no JSON object); restore or remove its folder.")
    return _with_names_of_today(value)


def _with_names_of_today(record: Record) -> Record:
    """Earlier versions called `recipe.compute` `recipe.engine`, and knew one defence."""
    if isinstance(record.get("defence"), str):
        named = {("defences" if name == "defence" else name): value for name, value in record.items()}
        record = named | {"defences": [record["defence"]]}
    settings = record.get("settings")
    recipe = settings.get("recipe") if isinstance(settings, dict) else None
    if isinstance(settings, dict) and isinstance(recipe, dict) and "engine" in recipe:
        renamed = {"compute" if name == "engine" else name: value for name, value in recipe.items()}
        return record | {"settings": settings | {"recipe": renamed}}
    return record


@contextmanager
def together(device: torch.device, request: Record) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; `DataError` in all unless all want the same."""
    own = {"data", "parent"}  # which name folders of one machine; hashes say what is in them
    shared = {name: value for name, value in request.items() if name not in own}
    shared["parent_sha256"] = request.get("parent", {}).get("weights_sha256")
    with distributed.group(device):
        everyone = distributed.all_gather(shared)
        for number, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                field, ours, others = difference(everyone[0], theirs)
                raise DataError(
                    f"Process {number} has another {field} than process 0 ({others} there, {ours} here). torchrun "
                    "needs the same data and settings everywhere; copy them, or share one file system."
                )
        yield
