"""`Victim`: whatever answers. A network, or with endpoint.py a file, a function, a server, or recorded answers."""

from abc import ABC, abstractmethod
from functools import cached_property

from torch import Tensor, nn

from undistill.core.identity import fingerprint
from undistill.data.batches import Batch, ViewDataset
from undistill.data.split import Samples
from undistill.data.views import Views, to_float
from undistill.training.answers import ASKED, PART, RememberedAnswers, mean_answer
from undistill.victims.answer import Answer, Form
from undistill.victims.protected import Answering, bare, form_of


class Victim(ABC):
    """Whatever answers inputs (B, C, H, W) in [0, 1].

    `at` names one asking. A victim whose answers vary finds by it what it answered then, so that an audit that was
    stopped goes on with the same answers; others need no name.
    """

    classes: tuple[str, ...]
    bits: float | None = None
    """The most bits that an answer carries beyond its label; None where nothing bounds them."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash of everything that may change an answer."""

    @property
    @abstractmethod
    def repeatable(self) -> bool:
        """Whether the same input always gets the same answer. Others are never remembered nor asked ahead."""

    @property
    @abstractmethod
    def form(self) -> Form:
        """How much of an answer it shows."""

    @abstractmethod
    def answer(self, inputs: Tensor, at: str = "") -> Answer:
        """The answer to each input, without gradient."""

    def answer_views(self, batch: Batch, at: str = "") -> Answer:
        """The answer to the views of a batch."""
        return self.answer(batch.images, at)

    def answer_samples(self, samples: Samples, num_classes: int, at: str = "") -> Answer:
        """The answer to each image of `samples` as it is, (N, K)."""
        parts = enumerate(samples.parts(PART))
        return Answer.joined([self.answer(to_float(samples[part].pixels), f"{at}/{number}") for number, part in parts])

    def asked(self, samples: Samples, num_classes: int) -> list[Tensor]:
        """Log-probabilities (N, K) of all classes for each image as it is, in main memory.

        What the interface does not show is filled in evenly. A victim whose answers vary is asked several times.
        """
        name, times = samples.image_digest.hex(), range(1 if self.repeatable else ASKED)
        return [self.answer_samples(samples, num_classes, f"{name}/{time}").filled.cpu() for time in times]

    def plain(self, samples: Samples, num_classes: int) -> Tensor:
        """The same once, as a mean where answers vary."""
        return mean_answer(self.asked(samples, num_classes))


class NetworkVictim(Victim):
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
        return form_of(self.network)

    @cached_property
    def identity(self) -> str:
        return fingerprint(self.answers.weights_sha256, self.answers.identity)

    @property
    def repeatable(self) -> bool:
        return self.answers.repeatable is not False

    @property
    def bits(self) -> float | None:  # type: ignore[override]
        return self.network.bits if isinstance(self.network, Answering) else None

    def answer(self, inputs: Tensor, at: str = "") -> Answer:
        return self._answer(self.answers.compute(inputs))

    def answer_views(self, batch: Batch, at: str = "") -> Answer:
        """The answer to the views of a batch, looked up if they were answered before."""
        return self._answer(self.answers(batch))

    def answer_samples(self, samples: Samples, num_classes: int, at: str = "") -> Answer:
        """The answer to each image of `samples` as it is, (N, K)."""
        dataset = ViewDataset(samples, Views(crop=0), 0, num_classes)
        return self._answer(self.answers.epoch(dataset, 0) if self.repeatable else self.answers.once(dataset))

    def plain(self, samples: Samples, num_classes: int) -> Tensor:
        return self.answers.plain(samples, num_classes)

    def asked(self, samples: Samples, num_classes: int) -> list[Tensor]:
        return self.answers.asked(samples, num_classes)

    def _answer(self, outputs: Tensor) -> Answer:
        answering = isinstance(self.network, Answering)
        return Answer.of_served(outputs.float()) if answering else Answer.of_logits(outputs)
