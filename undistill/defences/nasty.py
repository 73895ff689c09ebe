"""The nasty teacher: self-undermining knowledge distillation (Ma et al., ICLR 2021)."""

import math
from copy import deepcopy
from typing import Annotated, Any

from pydantic import Field, model_validator
from torch import nn

from undistill.core.errors import SpecError, Unsuitable
from undistill.core.spec import Temperature, Weight, within
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.defences.defence import Defence, Fresh
from undistill.defences.price import SHARE, at_price
from undistill.models.model import last_layer
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, undermining
from undistill.training.metrics import accuracy, evaluate, fitted_temperature
from undistill.training.objectives import Terms, Weighted

Points = Annotated[float, within(0.01, 100, "it is the points of accuracy that you accept to lose")]


class Nasty(Defence):
    """`CE(nasty, y) - omega T^2 KL(nasty/T || adversary/T)`, the adversary a frozen normal network (eq. 2).

    The paper calls the frozen network an adversary. It attacks nothing: it is what the nasty teacher learns to differ
    from, by default the honest teacher.
    """

    quiet = ("price", "calibrated")
    omega: Weight | None = 0.04
    """None where a price is stated, from which it is found."""
    T: Temperature = 4.0
    warm_start: float | None = Field(None, gt=0, le=1)
    """None trains from scratch, as published. A share starts from the unprotected weights and takes that share of the
    recipe's epochs."""
    adversary: str | None = None
    """A run folder whose network to differ from, instead of the honest teacher."""
    price: Points | None = None
    """Points of accuracy that you accept to lose, instead of omega; see docs/price.md."""
    calibrated: bool = False
    """Whether the last layer is scaled at the end, so that confidences fit the validation images (Guo et al. 2017)."""

    @model_validator(mode="before")
    @classmethod
    def _price_or_omega(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("price") is None:
            if isinstance(fields, dict) and fields.get("omega", 0) is None:
                raise ValueError("without a price, omega needs a value")
            return fields
        for name in ("omega", "warm_start"):
            if fields.get(name) is not None:
                raise ValueError(f"a price finds {name} by itself; leave {name} out")
        return fields | {"omega": None}

    @property
    def reference(self) -> str | None:
        return self.adversary

    def check(self, current: nn.Module, data: Split) -> None:
        if self.price:
            own = accuracy(evaluate(current, data.validation).cpu(), data.validation.labels)
            if self.price / 100 >= own:
                raise SpecError(
                    f"A price of {self.price:g} points is more than the accuracy there is, {100 * own:.1f} %."
                )
        if self.calibrated:
            calibrated(deepcopy(current), data)

    def protect(self, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        reference, state = fit.answers(honest), current.state_dict()
        rounding = 1e-6 * self.T**2  # of a KL in fp32, in nats

        def train(omega: float, warm_start: float | None) -> nn.Module:
            network = fresh()
            if warm_start:
                network.load_state_dict(state)

            def objective(nasty: nn.Module, batch: Batch) -> Terms:
                logits = nasty(batch.images)
                divergence = undermining(logits, reference(batch), self.T)
                return {"ce": cross_entropy(logits, batch.labels), "undermining": Weighted(divergence, omega)}

            epochs = math.ceil((warm_start or 1) * fit.recipe.epochs)
            choose = self.price is None  # what is lost is measured on the images by which an epoch would be chosen
            bounds = {"undermining": rounding}
            return fit(network, data, objective, epochs=epochs, choose=choose, bounds=bounds, capturable=True)

        if self.price:
            network = at_price(self.price, current, data, fit, lambda omega: train(omega, SHARE))
        else:
            assert self.omega is not None
            network = train(self.omega, self.warm_start)
        return calibrated(network, data) if self.calibrated else network


def calibrated(network: nn.Module, data: Split) -> nn.Module:
    """`network`, its last linear layer scaled to the temperature that fits the validation images.

    `Unsuitable` where no last linear layer makes the logits.
    """
    logits = evaluate(network, data.validation)
    T, layer = fitted_temperature(logits.cpu(), data.validation.labels), last_layer(network)
    if layer is not None:
        layer.weight.data /= T
        if layer.bias is not None:
            layer.bias.data /= T
    if not evaluate(network, data.validation).allclose(logits / T, rtol=1e-2, atol=1e-2):
        raise Unsuitable(
            "calibrated=True scales the last linear layer, and this network's logits are made otherwise; name "
            "--defence 'Temperature(T=None)' after it instead."
        )
    return network
