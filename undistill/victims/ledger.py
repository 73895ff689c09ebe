"""The ledger of what an attacker asked; the oracle (oracle.py) writes it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undistill.core.errors import BudgetExceeded


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
        mask.index_fill_(0, index, True)

    def knows(self, name: str) -> bool:
        """Whether some of the inputs that are known as `name` were asked."""
        return name in self._seen

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
