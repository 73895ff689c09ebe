"""Run folders: claimed with a request, finished with a record, read back without executing anything.

request.json          what was asked for, written first; the same request resumes or is instant
autotune-KEY.json     a measured trial of precision, layout and compilation, and what it chose
answers/              what the network answered to views, for later commands; may be removed at any time
checkpoint-N.pt       the N-th training of the run so far; gone once it is finished
metrics.jsonl         every epoch
weights.safetensors   the result
run.json              specs, parents, seed, metrics, versions, the weights' hash; written last
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from undistill.core.code import is_code, is_current
from undistill.core.errors import SpecError, StoreError
from undistill.core.files import require_plain, sha256
from undistill.core.identity import fingerprint, source_sha256
from undistill.core.spec import Spec
from undistill.data.source import Source
from undistill.data.split import Data
from undistill.defences.defence import Defence
from undistill.models.adapter import Adapter
from undistill.models.given import Given
from undistill.models.model import Model
from undistill.models.weights import largest_weights, load_weights
from undistill.runs.folder import Record, read_record

Finite = Annotated[float, Field(ge=-1e18, le=1e18, allow_inf_nan=False)]


class Metrics(BaseModel):
    """Measurements of a finished network; more may be recorded."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Finite]

    validation_accuracy: float = Field(ge=0, le=1)


class Parent(BaseModel):
    """The honest teacher from which a network was protected, as a path from the run's folder."""

    folder: str
    weights_sha256: str


class Recorded(BaseModel):
    """Fields that every run.json must have; others are allowed."""

    command: Literal["train", "adopt", "protect"]
    data: str
    data_sha256: str
    model: str
    adapter: str = str(Adapter())
    """How a network that was trained elsewhere is asked."""
    unseen: Literal["test"] | None = None
    """Which images adopted weights have certainly not been trained on."""
    defences: list[str] = Field(default_factory=list)
    """Defences that were applied, in order."""
    responses: list[str] = Field(default_factory=list)
    """Defences that give the network another structure; it is rebuilt before the weights are loaded."""
    calibrated_on: dict[str, str] = Field(default_factory=dict)
    """Images by which each response was calibrated, in words."""
    price: Finite | None = None
    """Points of accuracy that the owner accepted to lose, if he stated a price."""
    found: dict[str, Finite] = Field(default_factory=dict)
    """Numbers that a defence found by itself, such as omega."""
    parent: Parent | None = None
    start_sha256: str | None = None
    classes: list[str] = Field(min_length=2)
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    train_images: Annotated[int, Field(ge=1)] | None = None
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
        record = read_record(folder / "run.json")
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
        data = read_data(self.record, self.folder)
        self.require(data.shape, data.classes)
        return data

    def network(self, model: Model | None = None) -> nn.Module:
        """The network as it was measured, with its responses, in eval mode.

        `model` names the network again where it is the user's own code.
        """
        path, network = self.folder / "weights.safetensors", self.fresh(0, model)
        for text in self.record.get("responses", ()):
            network = self._defence(text).wrap(network, self.shape, len(self.record["classes"])).eval()
        if not path.exists() or sha256(path, largest_weights(network)) != self.record["weights_sha256"]:
            raise StoreError(
                f"{path} is missing or not the file that this run wrote; remove {self.folder} and make the run again."
            )
        load_weights(network, path)
        return network

    def fresh(self, seed: int, model: Model | None = None) -> nn.Module:
        """The same architecture, newly initialised by `seed`."""
        spec, recorded = self.model(model), Model.parse(str(self.record["model"]))
        if not isinstance(recorded, Given):
            self._require_unchanged(spec)
        elif isinstance(spec, Given) and spec != recorded:
            raise StoreError(
                f"{spec} is another network than {recorded.name}, of which {self.folder} was made: its modules, its "
                "code, or what it holds beside its weights has changed."
            )
        network = spec.build(self.shape, len(self.record["classes"]), seed)
        return self.adapter.wrap(network, self.shape[0], len(self.record["classes"])).eval()

    @property
    def adapter(self) -> Adapter:
        """How its network is asked."""
        return Adapter.parse(self.record.get("adapter", str(Adapter())))

    def trust(self, defences: Sequence[str | Defence]) -> None:
        """Let code of the user's own behind defences of this run be executed; `SpecError` for any other defence."""
        known = [text.rpartition("/")[2] for text in self.record.get("defences", ())]
        for named in defences:
            defence = Defence.from_user(named)
            if str(defence).rpartition("/")[2] not in known:
                raise SpecError(
                    f"{self.folder} is not protected by {defence}, and here nothing is protected anew: "
                    f"undistill protect {self.folder} --defence ... makes a run that is."
                )

    def _defence(self, text: str) -> Defence:
        spec = Defence.parse(text)
        self._require_unchanged(spec)
        return spec

    def _require_unchanged(self, spec: Spec) -> None:
        """Raise `StoreError` if the user's own code behind `spec` is no longer that of the run."""
        recorded = self.record["refers"].values()
        for name, now in spec.refers().items():
            if now not in recorded and not any(is_current(name, sha) for sha in recorded):
                raise StoreError(
                    f"The code of {spec}, or of a module that it imports, has changed since {self.folder} was made "
                    f"(SHA-256 now {now[:12]}...); restore it, or make the run again with another --out."
                )

    def model(self, override: Model | None = None) -> Model:
        """The recorded network; `override` names it again where it is the user's own code, or was an object."""
        recorded = str(self.record["model"])
        own = is_code(recorded) or recorded.startswith(f"{Given.__name__}(")
        return override if override and own else Model.parse(recorded)

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
    def has_history(self) -> bool:
        """Whether its weights come from elsewhere, so that nobody here knows on which images they were trained."""
        return self.record["command"] == "adopt" or bool(
            self.record.get("start_sha256") or self.record.get("pretrained")
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return str(self.record["weights_sha256"])

    @property
    def program(self) -> str:
        """Hash of our own program text behind the network and its responses, which the user's hashes leave out."""
        named: list[Spec] = [
            Model.parse(str(self.record["model"])),
            *map(Defence.parse, self.record.get("responses", ())),
        ]
        return fingerprint([source_sha256(type(one)) for spec in named for one in (spec, *spec.embedded)])

    @property
    def identity(self) -> str:
        """Hash of everything on which answers depend: two responses may have the same weights under them."""
        changing = [name for name in ("model", "adapter", "defences", "responses") if self.record.get(name)]
        return fingerprint(self.digest, self.record["refers"], [self.record[name] for name in changing])


def read_data(record: Record, folder: Path) -> Data:
    """The data that a record names; `StoreError` if it is no longer that on which the folder was made."""
    data = Source.parse(record["data"]).load()
    if data.digest != record["data_sha256"]:
        raise StoreError(
            f"{record['data']} no longer holds the images on which {folder} was made; "
            "restore them, or make it again in a new folder."
        )
    return data


def _unfinished(folder: Path) -> str:
    """Description of a folder without run.json."""
    if not (folder / "request.json").exists():
        return "no run of undistill"
    command = read_record(folder / "request.json").get("command")
    if command in ("train", "adopt", "protect"):
        return "unfinished: run the command that made it again"
    return f"the folder of another command ({command}), not of a model"


def parent(run: Run) -> Path:
    """The folder of the honest teacher from which `run` was protected."""
    if not run.record.get("parent"):
        raise StoreError(
            f"{run.folder} was not made by 'protect', so its honest twin is unknown: name it with --honest RUN."
        )
    folder = run.folder / str(run.record["parent"]["folder"])
    if not folder.is_dir() or Run.open(folder).digest != run.record["parent"]["weights_sha256"]:
        raise StoreError(f"The honest twin of {run.folder} is no longer at {folder}; name it with --honest RUN.")
    return folder
