"""`Victim`: whatever answers. Here a network; later also a file, an endpoint, recorded answers."""

from functools import cached_property
from typing import Protocol

from torch import Tensor, nn

from undistill.core.identity import fingerprint
from undistill.data.batches import Batch, ViewDataset
from undistill.data.split import Samples
from undistill.data.views import Views
from undistill.training.answers import RememberedAnswers
from undistill.victims.answer import Answer, Form
from undistill.victims.protected import Protected, bare


class Victim(Protocol):
    """Whatever answers inputs (B, C, H, W) in [0, 1]."""

    classes: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Hash of everything that may change an answer."""

    @property
    def repeatable(self) -> bool:
        """Whether the same input always gets the same answer. Others are never remembered nor asked ahead."""

    @property
    def form(self) -> Form:
        """How much of an answer it shows."""

    def answer(self, inputs: Tensor) -> Answer:
        """The answer to each input, without gradient."""


class NetworkVictim:
    """A network, with or without responses over it, that answers each view once."""

    def __init__(self, answers: RememberedAnswers, classes: tuple[str, ...] = ()) -> None:
        self.answers, self.classes = answers, classes

    @classmethod
    def of(cls, network: nn.Module) -> "NetworkVictim":
        """A network whose answers are remembered in memory alone."""
        return cls(RememberedAnswers(network))

    @property
    def network(self) -> nn.Module:
        return self.answers.network

    @property
    def bare(self) -> nn.Module:
        """The network as a thief with the weights has it, without responses."""
        return bare(self.network)

    @property
    def form(self) -> Form:
        return self.network.form if isinstance(self.network, Protected) else Form.FULL

    @cached_property
    def identity(self) -> str:
        return fingerprint(self.answers.weights_sha256, self.answers.identity)

    @property
    def repeatable(self) -> bool:
        return self.answers.repeatable is not False

    def answer(self, inputs: Tensor) -> Answer:
        return self._answer(self.answers.compute(inputs))

    def answer_views(self, batch: Batch) -> Answer:
        """The answer to the views of a batch, looked up if they were answered before."""
        return self._answer(self.answers(batch))

    def answer_samples(self, samples: Samples, num_classes: int) -> Answer:
        """The answer to each image of `samples` as it is, (N, K)."""
        dataset = ViewDataset(samples, Views(crop=0), 0, num_classes)
        return self._answer(self.answers.epoch(dataset, 0) if self.repeatable else self.answers.once(dataset))

    def _answer(self, outputs: Tensor) -> Answer:
        protected = isinstance(self.network, Protected)
        return Answer.of_served(outputs.float()) if protected else Answer.of_logits(outputs)
