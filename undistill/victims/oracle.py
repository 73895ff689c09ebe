"""The victim as its attacker sees it."""

from copy import deepcopy
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from undistill.core.errors import AccessDenied
from undistill.data.batches import Batch
from undistill.data.split import Samples
from undistill.training.captured import each_step
from undistill.victims.answer import Answer
from undistill.victims.ledger import Ledger
from undistill.victims.protected import responses_of
from undistill.victims.victim import NetworkVictim, Victim


class Access(IntEnum):
    """Access that an attack needs; each level includes the ones below."""

    NONE = 0
    QUERY = 1
    WEIGHTS = 2


class Oracle:
    """Answers a batch, writes every answer into the ledger, and keeps the weights to itself."""

    def __init__(
        self,
        victim: nn.Module | Victim,
        access: Access,
        budget: int | None = None,
        told: str | None = None,
        name: str = "",
    ) -> None:
        """`name` tells this attacker's askings from those of others, for victims whose answers vary."""
        self.access, self._name = access, name
        self.ledger = Ledger(budget)
        self.told = told
        """Text of the defence, for an adaptive attacker who knows it; None otherwise."""
        self._bought: dict[str, Answer] = {}
        """Answers bought from a victim whose answers vary, kept, since asking again would be another query."""
        self._victim: Victim = NetworkVictim.of(victim) if isinstance(victim, nn.Module) else victim

    def __call__(self, batch: Batch) -> Answer:
        """The answer to the views of a batch, without gradient.

        Raises `AccessDenied` for an attack that declared no queries, and `BudgetExceeded` before a batch that would
        pass the budget; such a batch is not answered and not counted.
        """
        self._require(Access.QUERY, "asked the victim")
        at = self._place()
        count, shown = len(batch.images), batch.shown
        each_step(lambda: self.ledger.bill(count))
        if shown is None:
            each_step(lambda: self.ledger.note_unknown(count))
        else:
            epoch = shown.dataset.views.shown(shown.epoch)
            self.ledger.note(f"{shown.dataset.digest}/{epoch}", len(shown.dataset.samples), shown.index)
        return self._victim.answer_views(batch, at)

    def once(self, samples: Samples, num_classes: int) -> Answer:
        """One answer (N, K) for each image as it is, bought once: what a thief with a budget asks for.

        The same images, bought a second time, are not billed again; a larger set of them is. Raises as a call does.
        """
        self._require(Access.QUERY, "asked the victim")
        name, at = samples.image_digest.hex(), self._place()
        if not self.ledger.knows(name):
            self.ledger.bill(len(samples))
            self.ledger.note(name, len(samples), torch.arange(len(samples)))
        if name in self._bought:
            return self._bought[name]
        answer = self._victim.answer_samples(samples, num_classes, at)
        if not self._victim.repeatable:
            self._bought[name] = answer
        return answer

    @torch.no_grad()
    def defended(self, answer: Answer, inputs: Tensor) -> Answer:
        """Any answer to `inputs` as the victim's responses change it, for a thief who knows the defence; no query.

        Whoever was told of no defence gets the answer back.
        """
        if self.told is not None and isinstance(self._victim, NetworkVictim):
            for response in responses_of(self._victim.network):
                answer = response(answer, inputs)
        return answer

    @property
    def weights(self) -> nn.Module:
        """A copy of the victim without its responses, for attacks that declare `Access.WEIGHTS`."""
        self._require(Access.WEIGHTS, "reached for the victim's weights")
        if not isinstance(self._victim, NetworkVictim):
            raise AccessDenied("This victim is no network; its weights cannot be had.")
        return deepcopy(self._victim.bare)

    def _place(self) -> str:
        """Name of the next asking: the attacker, and how many images were answered to him before."""
        return f"{self._name}/{self.ledger.billed}"

    def _require(self, access: Access, deed: str) -> None:
        if self.access < access:
            raise AccessDenied(
                f"The attack {deed} but was granted {self.access.name}; set its `needs` to Access.{access.name}."
            )

    def state_dict(self) -> dict[str, Any]:
        bought = {name: (answer.log_p, answer.shown) for name, answer in self._bought.items()}
        return self.ledger.state_dict() | ({"bought": bought} if bought else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state)
        self._bought = {name: Answer(log_p, shown) for name, (log_p, shown) in state.get("bought", {}).items()}
