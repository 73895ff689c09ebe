"""`Answer`: what a victim's interface shows for a batch of inputs."""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from undistill.core.unshown import LOG_ZERO, UNSHOWN
from undistill.training.losses import filled


class Form(IntEnum):
    """How much of an answer an interface shows; each level includes the ones below."""

    LABEL = 0
    """The top class."""
    TOP = 1
    """The highest probabilities."""
    FULL = 2
    """The probability of every class."""


class Answer(NamedTuple):
    """Log-probabilities (B, K) in fp32 as they were served, and a mask (B, K) of those that were served.

    What was not served stands at the finite value `LOG_ZERO`, so that no loss becomes infinite.
    """

    log_p: Tensor
    shown: Tensor
    whole: bool = False
    """True if every entry is known to be shown, so that nobody has to look at the mask."""

    @classmethod
    def of_logits(cls, logits: Tensor) -> "Answer":
        """The full answer of a classifier with these logits (B, K)."""
        log_p = F.log_softmax(logits.float(), dim=1).clamp_min(LOG_ZERO)
        return cls(log_p, torch.ones_like(log_p, dtype=torch.bool), whole=True)

    @classmethod
    def of_served(cls, served: Tensor) -> "Answer":
        """An answer that `served` holds in one tensor, as `to_served` writes it."""
        return cls(served.clamp_min(LOG_ZERO), served != UNSHOWN)

    @classmethod
    def joined(cls, answers: Sequence["Answer"]) -> "Answer":
        """Answers to several sets of inputs as one, in their order."""
        log_p, shown, whole = zip(*answers, strict=True)
        device = log_p[0].device  # some may have been kept in main memory
        joined = [torch.cat([one.to(device) for one in part]) for part in (log_p, shown)]
        return cls(joined[0], joined[1], all(whole))

    def to_served(self) -> Tensor:
        """Both in one tensor (B, K): log-probabilities, and `UNSHOWN` where nothing was served."""
        return self.log_p if self.whole else self.log_p.masked_fill(~self.shown, UNSHOWN)

    @property
    def top(self) -> Tensor:
        """The top class of each input, (B,)."""
        return self.log_p.argmax(1)

    @property
    def filled(self) -> Tensor:
        """Log-probabilities (B, K) of all classes: those that were not served share what is left of 1 evenly."""
        return self.log_p if self.whole else filled(self.to_served())
