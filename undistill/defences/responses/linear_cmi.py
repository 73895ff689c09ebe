"""A linear map of log-answers with little conditional mutual information (Fang et al., arXiv 2602.03396, 2026)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.core.spec import Weight
from undistill.data.split import Split
from undistill.defences.defence import ResponseDefence, calibration_answer
from undistill.training.fit import Fit
from undistill.training.losses import conditional_information, cross_entropy
from undistill.victims.answer import Answer
from undistill.victims.protected import Response

LEAST = -30.0  # log-probability below which a class counts as this unlikely


class LinearCMI(ResponseDefence):
    """Log-answers are mapped by one matrix, under which answers to images of one class are alike.

    `softmax(W log p)`, where W (K, K) minimises `CE + weight I(X; answer | label)` on validation images. The
    information is what distillation learns beyond the label. The published method is for language models; this is its
    form for classifiers. A matrix that can be inverted hides nothing from whoever learns it, as `AffineMap` does.
    """

    keeps_top = False
    weight: Weight = 1.0
    """Weight of the information against the cross-entropy of the labels, both in nats."""
    steps: int = Field(200, ge=1, le=100_000)
    """Iterations of L-BFGS."""

    @property
    def calibrated_on(self) -> str:
        return "validation"

    def least_images(self, num_classes: int) -> int:
        return num_classes

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Mapped(num_classes)

    def calibrate(self, response: Response, current: nn.Module, data: Split, fit: Fit) -> None:
        answer, labels = calibration_answer(current, data), data.validation.labels
        response.matrix.copy_(self.fitted(answer.filled.clamp_min(LEAST), labels))  # type: ignore[operator]

    def fitted(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """The matrix (K, K) for answers (N, K) to images with `labels` (N,)."""
        matrix = torch.eye(log_p.shape[1], requires_grad=True)
        search = torch.optim.LBFGS([matrix], max_iter=self.steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            mapped = log_p @ matrix.T
            value = cross_entropy(mapped, labels) + self.weight * conditional_information(mapped, labels)
            value.backward()
            return value

        search.step(loss)
        return matrix.detach()


class Mapped(Response):
    """The answer whose log-probabilities are mapped by a matrix."""

    matrix: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(num_classes))

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        with torch.autocast(answer.log_p.device.type, enabled=False):  # products would be bf16
            return Answer.of_logits(answer.filled.clamp_min(LEAST) @ self.matrix.T)
