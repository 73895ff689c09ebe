"""`Protected`: a network and the responses over it, which change its answers and nothing else."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self, cast

from torch import Tensor, nn

from undistill.victims.answer import Answer, Form


class Response(nn.Module):
    """Changes answers only. What it needs lies in its state dict: tables, a surrogate network.

    It works row by row: an answer in a batch is the answer that its input would get alone.
    """

    form: ClassVar[Form] = Form.FULL
    """The most that it lets through."""
    reads_inputs: ClassVar[bool] = False
    """Whether an answer depends on the input in other ways than through the answer that it changes."""

    not_in_graph: ClassVar[str] = ""
    """Why it cannot be a part of an exported graph; empty if it can."""

    @property
    def bits(self) -> float | None:
        """The most bits that an answer carries beyond its label, where that is bounded; else None."""
        return None

    @abstractmethod
    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        """`answer` to `inputs` (B, C, H, W) in [0, 1], as it leaves the house."""


class Answering(nn.Module):
    """A module that gives answers as an interface shows them, and not logits."""

    @property
    @abstractmethod
    def form(self) -> Form:
        """How much its answers show."""

    @property
    def bits(self) -> float | None:
        """The most bits that an answer carries beyond its label; None where nothing bounds them."""
        return None

    @abstractmethod
    def answer(self, inputs: Tensor) -> Answer:
        """The answer to `inputs` (B, C, H, W) in [0, 1]."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Log-probabilities (B, K) as `Answer.to_served` writes them."""
        return self.answer(inputs).to_served()


class Protected(Answering):
    """A classifier whose answers pass through `responses`, in their order."""

    def __init__(self, network: nn.Module, responses: Sequence[Response]) -> None:
        super().__init__()
        self.network = network
        self.responses = nn.ModuleList(responses)

    def train(self, mode: bool = True) -> Self:
        """Only the network is ever trained: responses stay as they were calibrated."""
        super().train(mode)
        self.responses.eval()
        return self

    def answer(self, inputs: Tensor) -> Answer:
        """The answer to `inputs` (B, C, H, W) in [0, 1]."""
        answer = answer_of(self.network, inputs)
        for response in self.responses:
            answer = response(answer, inputs)
        return answer

    @property
    def form(self) -> Form:
        """How much its answers show: no more than the network or a response lets through."""
        return min([form_of(self.network), *(response.form for response in responses_of(self))])

    @property
    def bits(self) -> float | None:
        """The most bits that an answer carries beyond its label; None where no response bounds them.

        What a later response makes of an answer alone carries no more than that answer does.
        """
        bound: float | None = None
        for response in responses_of(self):
            known = [bits for bits in (response.bits, None if response.reads_inputs else bound) if bits is not None]
            bound = min(known, default=None)
        return bound


def answer_of(network: nn.Module, inputs: Tensor) -> Answer:
    """The answer of a network to `inputs` (B, C, H, W), through its responses if it has any."""
    return network.answer(inputs) if isinstance(network, Answering) else Answer.of_logits(network(inputs))


def form_of(network: nn.Module) -> Form:
    """How much of an answer a network shows."""
    return network.form if isinstance(network, Answering) else Form.FULL


def bare(network: nn.Module) -> nn.Module:
    """The network without its responses: what a thief with the weights has."""
    return network.network if isinstance(network, Protected) else network


def responses_of(network: nn.Module) -> list[Response]:
    """The responses over a network, in their order."""
    return [cast(Response, one) for one in network.responses] if isinstance(network, Protected) else []


def with_response(network: nn.Module, response: Response) -> Protected:
    """`network` and the responses that it has, with one more over them."""
    return Protected(bare(network), [*responses_of(network), response])
