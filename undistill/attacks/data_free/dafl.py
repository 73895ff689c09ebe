"""DAFL: data-free learning of student networks (Chen et al., ICCV 2019)."""

import torch.nn.functional as F
from torch import Tensor, nn

from undistill.attacks.attack import Fresh
from undistill.attacks.data_free.generative import Generative
from undistill.attacks.data_free.synthesis import GeneratorTraining, without_images
from undistill.core.spec import LearningRate, Temperature, Weight
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.models.model import last_features
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation
from undistill.training.objectives import Terms
from undistill.victims.oracle import Oracle


class DAFL(Generative):
    """A generator whose images the victim is sure of (one-hot), that excite it (activation) and that cover all
    classes (information entropy); the student imitates the victim on them. Needs weights, no data."""

    lr: LearningRate = 0.02
    """Learning rate of the generator, with Adam; a slow one shows the same images for too long."""
    one_hot: Weight = 1.0
    """Weight of cross-entropy against the victim's own top answer (eq. 3)."""
    activation: Weight = 0.1
    """Weight of minus the mean absolute feature (eq. 4, which sums), for networks that end in a linear layer."""
    entropy: Weight = 5.0
    """Weight of minus the entropy of the mean answer, in nats (eq. 5, which divides by the number of classes)."""
    T: Temperature = 4.0

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        victim = oracle.weights
        training = GeneratorTraining(self.generator(data, fit), self.lr)

        def objective(network: nn.Module, batch: Batch) -> Terms:
            images = training.generator.sample(len(batch.images))
            with last_features(victim) as features:
                answers = victim(images).float()
            training.learn(self._loss(answers, features))
            return {"soft": distillation(answers.detach(), network(images.detach()), self.T)}

        beside = victim, training.generator
        student = fit(fresh(), without_images(data), objective, beside=beside, carried=[training], choose=False)
        fit.show(training.pictures())
        return student

    def _loss(self, answers: Tensor, features: list[Tensor]) -> Tensor:
        mean = F.softmax(answers, 1).mean(0)
        loss = self.one_hot * cross_entropy(answers, answers.argmax(1))
        loss = loss + self.entropy * (mean * mean.clamp_min(1e-8).log()).sum()
        return loss - self.activation * features[-1].float().abs().mean() if features else loss
