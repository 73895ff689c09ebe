"""`Bought`: answers that a thief bought once, as the answers to all views of his images."""

from collections.abc import Callable

import torch
from torch import Tensor

from undistill.core.unshown import LOG_ZERO
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.victims.answer import Answer
from undistill.victims.oracle import Oracle


class Bought:
    """`bought(batch)`: every view gets the answer to its whole image, a mixed view the same mixture of two answers."""

    def __init__(self, answer: Answer) -> None:
        """`answer` is to N images, in the order of the samples of which batches are drawn."""
        self.answer = answer

    @classmethod
    def of(cls, oracle: Oracle, data: Split) -> "Bought":
        """One answer for each training image: N queries."""
        return cls(oracle.once(data.train, data.num_classes))

    def __call__(self, batch: Batch) -> Answer:
        log_p, shown = (part.to(batch.images.device) for part in self.answer[:2])
        self.answer = Answer(log_p, shown)
        return by_sample(batch, lambda index: Answer(log_p[index], shown[index]))


def by_sample(batch: Batch, answer: Callable[[Tensor], Answer]) -> Answer:
    """The answer to a batch of views, from `answer`, which gives one answer to each of the samples `index`."""
    own, mixture = answer(batch.index), batch.mixture
    if mixture is None:
        return own
    other, share = answer(mixture.partner).filled, mixture.share[:, None].to(own.log_p.device)
    log_p = torch.logaddexp(own.filled + share.log(), other + (1 - share).log()).clamp_min(LOG_ZERO)
    return Answer(log_p, torch.ones_like(log_p, dtype=torch.bool))
