"""CMIM: answers of one class that are all alike (Ye et al., "Towards Undistillable Models", 2025)."""

import math

import torch
from torch import nn

from undistill.core.spec import Temperature, Weight
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.defences.defence import Defence, Fresh
from undistill.training.class_means import ClassMeans
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, kl
from undistill.training.objectives import Terms, Weighted


class CMIM(Defence):
    """A network whose answers to images of one class are all alike.

    The loss is `CE + weight E_t[ KL(softmax(z/t) || Q_y) ]`, where `Q_y` is the mean answer of the class at temperature
    t. The second term is the conditional mutual information of image and answer given the label, which is what
    imitation learns beyond it. The means and the network are learnt in turn: each batch moves the means, then it moves
    the network towards them. The expectation is over t = 1, sqrt(T) and T.
    """

    weight: Weight = 1.0
    T: Temperature = 4.0

    def protect(self, current: nn.Module, honest: nn.Module, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        means = {t: ClassMeans(data.num_classes, fit.device) for t in (1.0, math.sqrt(self.T), self.T)}

        def objective(network: nn.Module, batch: Batch) -> Terms:
            logits = network(batch.images)
            apart = [
                kl(logits / t, mean((logits.detach().float() / t).log_softmax(1), batch.labels, batch.epoch))
                for t, mean in means.items()
            ]
            information = torch.stack(apart).mean()
            return {"ce": cross_entropy(logits, batch.labels), "information": Weighted(information, self.weight)}

        return fit(fresh(), data, objective, capturable=True)
