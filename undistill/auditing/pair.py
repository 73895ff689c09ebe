"""`VictimPair`: a victim beside its honest twin, as an audit asks them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undistill.auditing.schema import Side
from undistill.core.errors import NonFinite, StoreError
from undistill.core.files import GIB
from undistill.core.seeds import derive
from undistill.data.pool import read_pool
from undistill.data.split import Data, Split
from undistill.models.model import Model
from undistill.models.trial import varies
from undistill.runs.contact import Contact
from undistill.runs.run import Run, parent
from undistill.training.answers import REMEMBER, AnswerStore, RememberedAnswers
from undistill.training.compute import EXACT, Compute, own_device
from undistill.victims.victim import NetworkVictim, Victim

VALIDATION_SHARE = 0.1
NO_TWIN = "none"
"""Named instead of a run folder where a victim is to be audited without a twin."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class QueryOptions:
    """How networks are asked: on which device, with which compute settings, and how many answers are kept."""

    device: torch.device = CPU
    compute: Compute = EXACT
    remember: float = REMEMBER
    """GiB of disk for each of the two; 0 keeps nothing."""

    def victim(self, run: Run, network: nn.Module) -> NetworkVictim:
        """The network, answering each view once; its answers are kept in its run folder."""
        store = AnswerStore(run.folder / "answers", self.remember * GIB)
        network = network.to(self.device)
        repeatable = not varies(network, run.shape)
        answers = RememberedAnswers(network, self.compute, store, repeatable=repeatable)
        return NetworkVictim(answers, tuple(run.record["classes"]))


@dataclass(frozen=True, eq=False)
class VictimPair:
    """The two runs, and the seeds with which students attack this pair."""

    victim: Run | Contact
    honest: Run | None
    """None where no twin is known."""
    seeds: tuple[int, ...]
    model: Model | None = None
    options: QueryOptions = QueryOptions()
    share: float = 1.0
    """Share of the training images that attackers hold."""
    pool: str = ""
    """Source of the images of thieves who have none of the owner's; empty where there are no such thieves."""

    def __post_init__(self) -> None:
        if self.honest and self.victim.record["data_sha256"] != self.honest.record["data_sha256"]:
            raise StoreError(
                f"{self.victim.folder} and {self.honest.folder} were made on different data; "
                "only networks of the same data can be compared."
            )

    @classmethod
    def of(
        cls,
        victim: str | Path | Run | Contact,
        honest: str | Path | Run | None,
        seeds: Sequence[int],
        model: str | Model | nn.Module | Callable[..., nn.Module] | None,
        pool: str = "",
    ) -> "VictimPair":
        """`honest` defaults to the run from which the victim was protected; `NO_TWIN` leaves it out."""
        run = Run.open(victim) if isinstance(victim, str | Path) else victim
        honest = honest or (NO_TWIN if isinstance(run, Contact) else parent(run))
        if isinstance(run, Contact) and honest != NO_TWIN:
            run.require_validation()
        twin = honest if isinstance(honest, Run) else None if honest == NO_TWIN else Run.open(honest)
        return cls(run, twin, tuple(seeds), None if model is None else Model.from_user(model), pool=pool)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the runs, not what was loaded from them, and loads each pair once."""
        return _loaded, (self.options, self.victim, self.honest, self.seeds, self.model, self.share, self.pool)

    @cached_property
    def data(self) -> Data:
        return self.victim.data()

    @cached_property
    def victims(self) -> dict[Side, Victim]:
        """The victim of each side. Attacks that make no queries are compared with the victim."""
        found = {side: self._answering(run) for side, run in self.runs.items()}
        return found | {"none": found["victim"]}

    def _answering(self, run: Run | Contact) -> Victim:
        if isinstance(run, Contact):
            return run.victim()
        return self.options.victim(run, run.network(self.model))

    @property
    def runs(self) -> dict[Side, Run | Contact]:
        """The runs that there are."""
        runs: dict[Side, Run | Contact | None] = {"victim": self.victim, "honest": self.honest}
        return {side: run for side, run in runs.items() if run}

    @property
    def sides(self) -> tuple[Side, ...]:
        """Sides that answer."""
        return tuple(self.runs)

    @cached_property
    def attackers(self) -> Split:
        """Data of every attacker: the training images, divided anew. The same for all, so that answers are shared."""
        data = self.data
        if isinstance(self.victim, Contact):
            data = replace(data, train=self.victim.spec.known(data.train))
        validation = max(VALIDATION_SHARE, data.num_classes / (self.share * len(data.train)))
        return data.attackers(validation, derive(0, "attackers"), self.share)

    @cached_property
    def surrogate(self) -> Split:
        """Data of thieves who have none of the owner's: the pool, without labels."""
        return replace(self.attackers.unlabelled, train=read_pool(self.pool, self.data))

    def network(self, side: Side) -> nn.Module | None:
        """The network of a side; None for a black box."""
        victim = self.victims[side]
        return victim.network if isinstance(victim, NetworkVictim) else None

    def require_finite(self) -> None:
        """Raise `NonFinite`, naming the run, if one of the two answers NaN or infinity to the test images."""
        for side, run in self.runs.items():
            try:
                self.test_logits(side)
            except NonFinite as error:
                raise NonFinite(f"{run.folder}: {error}") from None

    def test_logits(self, side: Side) -> Tensor:
        """Answers (N, K) of a side to the test images, in main memory; their mean where they vary."""
        return self.victims[side].plain(self.data.test, self.data.num_classes)

    def asked(self, side: Side) -> list[Tensor]:
        """The same answers, once for each time that the side was asked: several times if they vary."""
        return self.victims[side].asked(self.data.test, self.data.num_classes)


RECENT = 2
"""Pairs that a worker keeps loaded. Jobs come pair by pair, so that more would only fill its memory."""
_pairs: dict[tuple[object, ...], VictimPair] = {}


def _loaded(
    options: QueryOptions,
    victim: Run | Contact,
    honest: Run | None,
    seeds: tuple[int, ...],
    model: Model | None,
    *others: Any,
) -> VictimPair:
    """The pair, on this process's own GPU where it was on one."""
    options = replace(options, device=own_device(options.device))
    runs = ((run.folder, run.identity) if run else None for run in (victim, honest))
    key = (*runs, options, seeds, model, *others)
    pair = _pairs.pop(key) if key in _pairs else VictimPair(victim, honest, seeds, model, options, *others)
    _pairs[key] = pair  # the latest last
    while len(_pairs) > RECENT:
        del _pairs[next(iter(_pairs))]
    return _pairs[key]
