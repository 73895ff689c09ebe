"""Answers at another temperature; one that is fitted calibrates them (Guo et al., ICML 2017)."""

import torch
from torch import Tensor, nn

from undistill.core import spec
from undistill.data.split import Split
from undistill.defences.defence import ResponseDefence, calibration_answer
from undistill.training.fit import Fit
from undistill.training.metrics import fitted_temperature
from undistill.victims.answer import Answer
from undistill.victims.protected import Response


class Temperature(ResponseDefence):
    """Softer answers (T above 1) or sharper ones: `softmax(log p / T)`. A thief who knows T undoes it."""

    T: spec.Temperature | None = 4.0
    """None takes the temperature with the lowest negative log-likelihood on validation images."""

    @property
    def calibrated_on(self) -> str:
        return "validation" if self.T is None else ""

    def response(self, shape: tuple[int, int, int], num_classes: int) -> Response:
        return Softened(self.T or 1.0)

    def calibrate(self, response: Response, current: nn.Module, data: Split, fit: Fit) -> None:
        if self.T is None:
            fitted = fitted_temperature(calibration_answer(current, data).filled, data.validation.labels)
            response.T.fill_(fitted)  # type: ignore[operator]


class Softened(Response):
    """The answer at temperature `T`."""

    T: Tensor

    def __init__(self, T: float) -> None:
        super().__init__()
        self.register_buffer("T", torch.tensor(T))

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        return Answer.of_logits(answer.filled / self.T)
