"""Networks of a response's own, trained on the owner's images when it is calibrated."""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.defences.defence import ResponseDefence
from undistill.models.model import Model
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms
from undistill.victims.protected import Response


class SurrogateResponse(Response):
    """A response that asks a network of its own about the input; `settings` are its numbers."""

    reads_inputs = True

    def __init__(self, surrogate: nn.Module, **settings: float) -> None:
        super().__init__()
        self.surrogate, self._settings = surrogate, settings
        for name, value in settings.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self._settings.items())


class SurrogateDefence(ResponseDefence):
    """The common base of responses that ask a small network of their own beside the one they protect."""

    listed = False
    surrogate: str = "ConvNet(width=8)"
    """The small network: a listed one, or file.py:factory."""
    epochs: int = Field(10, ge=1, le=10_000)
    """Epochs of its training."""

    @property
    def calibrated_on(self) -> str:
        return "training"

    @property
    def embedded(self) -> Sequence[Model]:
        return [Model.parse(self.surrogate)]

    def refers(self) -> dict[str, str]:
        return super().refers() | Model.parse(self.surrogate).refers()

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """The surrogate, untrained, the same at each call; `ModelError` if it cannot be built for such images."""
        return Model.parse(self.surrogate).build(shape, num_classes, 0).eval()

    def calibrate(self, response: Response, current: nn.Module, data: Split, fit: Fit) -> None:
        network: nn.Module = response.surrogate  # type: ignore[assignment]

        def objective(surrogate: nn.Module, batch: Batch) -> Terms:
            return self.objective(surrogate(batch.images), batch.labels)

        fit(network, data, objective, epochs=self.epochs, choose=False, aside=True)

    def objective(self, logits: Tensor, labels: Tensor) -> Terms:
        """The terms of the surrogate's loss on its `logits` (B, K); by default it classifies."""
        return {"ce": cross_entropy(logits, labels)}
