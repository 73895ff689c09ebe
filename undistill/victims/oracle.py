"""The victim as its attacker sees it."""

from copy import deepcopy
from enum import IntEnum
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from undistill.core.errors import AccessDenied, BudgetExceeded
from undistill.data.batches import Batch
from undistill.training.answers import RememberedAnswers
from undistill.training.losses import LOG_ZERO


class Access(IntEnum):
    """What an attack needs; each level includes the ones below."""

    NONE = 0
    QUERY = 1
    WEIGHTS = 2


class Oracle:
    """RememberedAnswers a batch with log-probabilities, counts every answer, and keeps the weights to itself.

    Remembered or not, an answer counts. `budget` is the largest number of images it answers; None is unlimited.
    """

    def __init__(self, victim: nn.Module | RememberedAnswers, access: Access, budget: int | None = None) -> None:
        self.access = access
        self.budget = budget
        self.queries = 0
        self._answers = victim if isinstance(victim, RememberedAnswers) else RememberedAnswers(victim)

    def __call__(self, batch: Batch) -> Tensor:
        """Log-probabilities (B, K) in fp32, floored at `LOG_ZERO`, without gradient.

        Raises `AccessDenied` for an attack that declared no queries, and `BudgetExceeded` before
        a batch that would pass the budget; such a batch is not answered and not counted.
        """
        self._require(Access.QUERY, "asked the victim")
        if self.budget is not None and self.queries + len(batch.images) > self.budget:
            raise BudgetExceeded(
                f"The query budget of {self.budget} is spent: {self.queries} images answered, "
                f"{len(batch.images)} more asked. Raise the budget, or train for fewer epochs."
            )
        self.queries += len(batch.images)
        return F.log_softmax(self._answers(batch).float(), dim=1).clamp_min(LOG_ZERO)

    @property
    def weights(self) -> nn.Module:
        """A copy of the victim, for attacks that declare `Access.WEIGHTS`."""
        self._require(Access.WEIGHTS, "reached for the victim's weights")
        return deepcopy(self._answers.network)

    def _require(self, access: Access, deed: str) -> None:
        if self.access < access:
            raise AccessDenied(
                f"The attack {deed} but was granted {self.access.name}; set its `needs` to Access.{access.name}."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"queries": self.queries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        queries = state["queries"]
        if type(queries) is not int or queries < 0:
            raise ValueError(f"its queries are {queries!r:.40}")
        self.queries = queries
