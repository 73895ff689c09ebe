"""ZSKT: zero-shot knowledge transfer via adversarial belief matching (Micaelli and Storkey, NeurIPS 2019)."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Attack
from undistill.data import Split
from undistill.fit import Fit
from undistill.losses import kl
from undistill.oracle import Access, Oracle
from undistill.stream import Batch
from undistill.synthesis import Generator, Imagination, without_data


class ZSKT(Attack):
    """A generator that looks for images on which the student disagrees with the victim, `KL(victim || student)`, and
    a student that gives way on the same noise (algorithm 1). Without attention transfer, for which both need the
    same feature maps. Needs weights, no data."""

    needs = Access.WEIGHTS
    student_steps: int = Field(10, ge=1)
    """Steps of the student for one of the generator (10 in the paper)."""
    lr: float = Field(1e-3, gt=0)
    """Of the generator, with Adam."""
    latent: int = Field(100, ge=1)
    width: int = Field(64, ge=1)
    """Channels of the generator."""

    def run(self, oracle: Oracle, student: nn.Module, data: Split, fit: Fit) -> nn.Module:
        victim = oracle.weights
        imagination = Imagination(Generator(data.shape, self.latent, self.width).to(fit.device), self.lr)
        data, fit = without_data(data, fit, imagination)

        def objective(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            if imagination.steps % self.student_steps == 0:
                imagination.noise = imagination.generator.noise(len(batch.images))
                images = imagination.generator(imagination.noise)
                imagination.learn(-kl(victim(images), network(images)))
            imagination.steps += 1
            with torch.no_grad():
                images = imagination.generator(imagination.noise)[: len(batch.images)]
                answers = victim(images)
            return {"belief": kl(answers, network(images))}

        student = fit(student, data, objective)
        fit.show(imagination.pictures())
        return student
