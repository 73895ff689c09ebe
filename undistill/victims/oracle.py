"""The victim as its attacker sees it, and the ledger of what he asked."""

from copy import deepcopy
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from undistill.core.errors import AccessDenied, BudgetExceeded
from undistill.data.batches import Batch
from undistill.data.split import Samples
from undistill.victims.answer import Answer
from undistill.victims.victim import NetworkVictim


class Access(IntEnum):
    """Access that an attack needs; each level includes the ones below."""

    NONE = 0
    QUERY = 1
    WEIGHTS = 2


@dataclass
class Ledger:
    """Counts of an attacker's queries. One answered image is one query, whoever remembers what.

    `billed` is what an endpoint would bill: every image that was answered, again each time it is asked. `distinct`
    counts different inputs. Answers that the auditor needs for measuring are in `evaluation`, and on nobody's bill.
    """

    budget: int | None = None
    """The most images that are answered; None is unlimited."""
    billed: int = 0
    evaluation: int = 0
    _seen: dict[str, Tensor] = field(default_factory=dict)
    """For each dataset and epoch, a mask of the samples that were asked."""
    _unknown: int = 0
    """Inputs that are no views of a dataset, each taken for a new one."""

    @property
    def left(self) -> int | None:
        """How many more images are answered; None is unlimited."""
        return None if self.budget is None else self.budget - self.billed

    @property
    def distinct(self) -> int:
        return self._unknown + sum(int(mask.sum()) for mask in self._seen.values())

    def bill(self, count: int) -> None:
        """Count `count` images; `BudgetExceeded`, and nothing is counted, where that passes the budget."""
        if self.left is not None and count > self.left:
            raise BudgetExceeded(
                f"The query budget of {self.budget} is spent: {self.billed} images answered, {count} more asked. "
                "Raise the budget, or train for fewer epochs."
            )
        self.billed += count

    def note(self, name: str, count: int, index: Tensor) -> None:
        """Remember which of `count` inputs, known together as `name`, were asked. Nothing here waits for a GPU."""
        if name not in self._seen:
            self._seen[name] = torch.zeros(count, dtype=torch.bool, device=index.device)
        mask = self._seen[name] = self._seen[name].to(index.device)
        mask[index] = True

    def note_unknown(self, count: int) -> None:
        self._unknown += count

    def state_dict(self) -> dict[str, Any]:
        seen = {name: (len(mask), np.packbits(mask.cpu().numpy()).tobytes().hex()) for name, mask in self._seen.items()}
        return {"billed": self.billed, "unknown": self._unknown, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises errors of many kinds for a state that `state_dict` did not write."""
        counts = state["billed"], state["unknown"]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"its queries are {counts!r:.60}")
        self._seen = {
            name: torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=size)).bool()
            for name, (size, bits) in state["seen"].items()
        }
        self.billed, self._unknown = counts


class Oracle:
    """Answers a batch, writes every answer into the ledger, and keeps the weights to itself."""

    def __init__(
        self,
        victim: nn.Module | NetworkVictim,
        access: Access,
        budget: int | None = None,
        told: str | None = None,
    ) -> None:
        self.access = access
        self.ledger = Ledger(budget)
        self.told = told
        """Text of the defence, for an adaptive attacker who knows it; None otherwise."""
        self._victim = victim if isinstance(victim, NetworkVictim) else NetworkVictim.of(victim)

    def __call__(self, batch: Batch) -> Answer:
        """The answer to the views of a batch, without gradient.

        Raises `AccessDenied` for an attack that declared no queries, and `BudgetExceeded` before a batch that would
        pass the budget; such a batch is not answered and not counted.
        """
        self._require(Access.QUERY, "asked the victim")
        self.ledger.bill(len(batch.images))
        shown = batch.shown
        if shown is None:
            self.ledger.note_unknown(len(batch.images))
        else:
            epoch = shown.dataset.views.shown(shown.epoch)
            self.ledger.note(f"{shown.dataset.digest}/{epoch}", len(shown.dataset.samples), shown.index)
        return self._victim.answer_views(batch)

    def once(self, samples: Samples, num_classes: int) -> Answer:
        """One answer (N, K) for each image as it is, bought once: what a thief with a budget asks for.

        Images that were bought before are not billed again. Raises as a call does.
        """
        self._require(Access.QUERY, "asked the victim")
        name = samples.image_digest.hex()
        if name not in self.ledger._seen:
            self.ledger.bill(len(samples))
            self.ledger.note(name, len(samples), torch.arange(len(samples)))
        return self._victim.answer_samples(samples, num_classes)

    @property
    def weights(self) -> nn.Module:
        """A copy of the victim without its responses, for attacks that declare `Access.WEIGHTS`."""
        self._require(Access.WEIGHTS, "reached for the victim's weights")
        return deepcopy(self._victim.bare)

    def _require(self, access: Access, deed: str) -> None:
        if self.access < access:
            raise AccessDenied(
                f"The attack {deed} but was granted {self.access.name}; set its `needs` to Access.{access.name}."
            )

    def state_dict(self) -> dict[str, Any]:
        return self.ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state)
