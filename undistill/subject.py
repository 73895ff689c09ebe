"""`Subject`: a victim beside its honest twin, as an audit asks them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undistill.answers import GIB, REMEMBER, Answers, AnswerStore
from undistill.data import Data, Split
from undistill.engine import EXACT, Engine
from undistill.errors import NonFinite, StoreError
from undistill.models import Model
from undistill.report.schema import Side
from undistill.seeds import derive
from undistill.store import Run

VALIDATION_SHARE = 0.1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Asking:
    """How networks are asked: where, with which engine, and how much of their answers is kept."""

    device: torch.device = CPU
    engine: Engine = EXACT
    remember: float = REMEMBER
    """GiB of disk for each of the two; 0 keeps nothing."""

    def answers(self, run: Run, network: nn.Module) -> Answers:
        """The network, answering each view once; its answers are kept in its run folder."""
        store = AnswerStore(run.folder / "answers", self.remember * GIB)
        return Answers(network.to(self.device), self.engine, store)


@dataclass(frozen=True, eq=False)
class Subject:
    """The two runs, and the seeds with which students attack this pair."""

    victim: Run
    honest: Run
    seeds: tuple[int, ...]
    model: Model | None = None
    asking: Asking = Asking()
    share: float = 1.0
    """Of the training images, what attackers hold."""

    def __post_init__(self) -> None:
        if self.victim.record["data_sha256"] != self.honest.record["data_sha256"]:
            raise StoreError(
                f"{self.victim.folder} and {self.honest.folder} were made on different data; "
                "only networks of the same data can be compared."
            )

    @classmethod
    def of(
        cls,
        victim: str | Path | Run,
        honest: str | Path | Run | None,
        seeds: Sequence[int],
        model: str | Model | None,
    ) -> "Subject":
        """`honest` defaults to the run from which the victim was protected."""
        run = victim if isinstance(victim, Run) else Run.open(victim)
        honest = honest or parent(run)
        twin = honest if isinstance(honest, Run) else Run.open(honest)
        return cls(run, twin, tuple(seeds), None if model is None else Model.named(model))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the runs, not what was loaded from them, and loads each pair once."""
        return _loaded, (self.victim, self.honest, self.seeds, self.model, self.asking, self.share)

    @cached_property
    def data(self) -> Data:
        return self.victim.data()

    @cached_property
    def answers(self) -> dict[Side, Answers]:
        """Both networks; where no one is asked, the victim stands for what students are compared with."""
        victim = self.asking.answers(self.victim, self.victim.network(self.model))
        honest = self.asking.answers(self.honest, self.honest.network(self.model))
        return {"victim": victim, "honest": honest, "none": victim}

    @cached_property
    def attackers(self) -> Split:
        """What every attacker has: the training images, divided anew; the same for all, so that answers are shared."""
        validation = max(VALIDATION_SHARE, self.data.num_classes / (self.share * len(self.data.train)))
        return self.data.attackers(validation, derive(0, "attackers"), self.share)

    def network(self, side: Side) -> nn.Module:
        return self.answers[side].network

    def require_finite(self) -> None:
        """Raise `NonFinite`, naming the run, if one of the two answers NaN or infinity to the test images."""
        runs: dict[Side, Run] = {"victim": self.victim, "honest": self.honest}
        for side, run in runs.items():
            try:
                self.test_logits(side)
            except NonFinite as error:
                raise NonFinite(f"{run.folder}: {error}") from None

    def test_logits(self, side: Side) -> Tensor:
        """What a side answers to the test images."""
        return self.answers[side].plain(self.data.test, self.data.num_classes)


_subjects: dict[tuple[object, ...], Subject] = {}


def _loaded(
    victim: Run, honest: Run, seeds: tuple[int, ...], model: Model | None, asking: Asking, share: float
) -> Subject:
    key = (victim.folder, victim.digest, honest.folder, honest.digest, seeds, model, asking, share)
    if key not in _subjects:
        _subjects[key] = Subject(victim, honest, seeds, model, asking, share)
    return _subjects[key]


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
