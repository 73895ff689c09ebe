"""Gradient redirection (GRAD^2; Mazeika et al., ICML 2022): the thief's update points where the owner wants."""

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call, jvp

from undistill.defences.surrogate import SurrogateDefence, SurrogateResponse
from undistill.victims.answer import Answer
from undistill.victims.protected import Response


class GradientRedirection(SurrogateDefence):
    """Answers are moved, within an L1 distance, so that an update by them takes a thief where the owner wants.

    `<G'y', 1>` is maximised within `||y' - y||_1 <= epsilon`, where row k of `G` is the gradient of a surrogate's `log
    p_k(x)` in all its parameters. The best class gains, taken from the worst upwards; the top class may change, which
    is measured.
    """

    keeps_top = False
    epsilon: float = Field(1.0, gt=0, le=2)
    """L1 distance from the true answer; 2 is the largest there is."""

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Redirected(self.build(shape, num_classes), epsilon=self.epsilon)


class Redirected(SurrogateResponse):
    """Moves probability from the classes that serve a thief's update to the one that spoils it most."""

    not_in_graph = "it computes gradients for every answer"

    epsilon: float

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        y = redirected(answer.filled.exp(), self.slopes(inputs), self.epsilon)
        return Answer(y.clamp_min(1e-30).log(), torch.ones_like(answer.shown), whole=True)

    def slopes(self, inputs: Tensor) -> Tensor:
        """Sum (B, K) of each gradient of `log p_k` over all parameters: a derivative in the direction of ones."""
        parameters = {name: value.detach() for name, value in self.surrogate.named_parameters()}
        ones = {name: torch.ones_like(value) for name, value in parameters.items()}

        def log_p(parameters: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(self.surrogate, parameters, (inputs,))
            return logits.float().log_softmax(1)

        with torch.autocast(inputs.device.type, enabled=False):  # which would cast weights and not their directions
            slopes: Tensor = jvp(log_p, (parameters,), (ones,))[1]
        return slopes


def redirected(y: Tensor, slopes: Tensor, epsilon: float) -> Tensor:
    """The distribution (B, K) with the highest mean of `slopes` (B, K) within `epsilon` of `y` (B, K) in L1."""
    best = slopes.argmax(1, keepdim=True)
    gain = (1 - y.gather(1, best)).clamp_max(epsilon / 2)
    order = slopes.scatter(1, best, torch.inf).argsort(dim=1, stable=True)
    ranked = y.gather(1, order)
    before = ranked.cumsum(1) - ranked
    taken = (gain - before).clamp_min(0).minimum(ranked)
    taken = torch.zeros_like(y).scatter(1, order, taken).scatter(1, best, 0.0)
    return (y - taken).scatter_add(1, best, taken.sum(1, keepdim=True))
