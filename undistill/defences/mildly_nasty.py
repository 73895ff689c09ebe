"""A nasty teacher whose last layer alone is trained."""

from copy import deepcopy

from torch import nn

from undistill.core.errors import Unsuitable
from undistill.core.spec import Temperature, Weight
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.defences.defence import Defence, Fresh
from undistill.models.model import last_layer
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, undermining
from undistill.training.objectives import Terms, Weighted


class MildlyNasty(Defence):
    """The loss of `Nasty` on the last linear layer; features and batch statistics stay those of the current network.

    It takes a fraction of the time, and undermines less: a last layer can move answers, but not features.
    """

    omega: Weight = 0.04
    T: Temperature = 4.0

    def check(self, current: nn.Module, data: Split) -> None:
        if last_layer(current) is None:
            raise Unsuitable(f"{self} trains the last linear layer, and this network has none; use Nasty.")

    def protect(self, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        network, reference = deepcopy(current).requires_grad_(False), fit.answers(honest)
        layer = last_layer(network)
        assert layer is not None
        layer.requires_grad_(True)

        def objective(nasty: nn.Module, batch: Batch) -> Terms:
            logits = nasty.eval()(batch.images)
            divergence = undermining(logits, reference(batch), self.T)
            return {"ce": cross_entropy(logits, batch.labels), "undermining": Weighted(divergence, self.omega)}

        return fit(network, data, objective, capturable=True)
