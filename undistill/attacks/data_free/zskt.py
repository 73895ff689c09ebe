"""ZSKT: zero-shot knowledge transfer via adversarial belief matching (Micaelli and Storkey, NeurIPS 2019)."""

from typing import Any

import torch
from pydantic import Field
from torch import nn

from undistill.attacks.attack import Fresh
from undistill.attacks.data_free.generative import Generative
from undistill.attacks.data_free.synthesis import Generator, GeneratorTraining, without_images
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import kl
from undistill.training.objectives import Terms
from undistill.victims.oracle import Oracle


class ZSKT(Generative):
    """A generator that looks for images on which the student disagrees with the victim, `KL(victim || student)`, and
    a student that gives way on the same noise (algorithm 1). Without attention transfer, for which both need the
    same feature maps. Needs weights, no data."""

    student_steps: int = Field(10, ge=1, le=10_000)
    """Steps of the student for one of the generator (10 in the paper)."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        victim = oracle.weights
        training = _Game(self.generator(data, fit), self.lr)

        def objective(network: nn.Module, batch: Batch) -> Terms:
            if training.steps % self.student_steps == 0:
                training.noise = training.generator.noise(len(batch.images))
                images = training.generator(training.noise)
                training.learn(-kl(victim(images), network(images)))
            training.steps += 1
            with torch.no_grad():
                images = training.generator(training.noise)[: len(batch.images)]
                answers = victim(images)
            return {"belief": kl(answers, network(images))}

        beside = victim, training.generator
        student = fit(fresh(), without_images(data), objective, beside=beside, carried=[training], choose=False)
        fit.show(training.pictures())
        return student


class _Game(GeneratorTraining):
    """A generator, the number of steps so far, and the noise of its last step."""

    def __init__(self, generator: Generator, lr: float) -> None:
        super().__init__(generator, lr)
        self.steps = 0
        self.noise = generator.noise(0)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps, "noise": self.noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps, self.noise = state["steps"], state["noise"]
