"""DisGUIDE: disagreement-guided data-free model extraction (Rosenthal et al., AAAI 2023)."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Attack, Buying, Fresh, Role, ThiefData, tries
from undistill.attacks.data_free.synthesis import Generator, GeneratorTraining, to_bytes, without_images
from undistill.core.spec import LearningRate, Weight
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.data.views import to_float
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, kl
from undistill.training.objectives import Terms
from undistill.training.optimisers import Extra
from undistill.victims.oracle import Access, Oracle


class DisGUIDE(Attack):
    """A generator makes images on which two students disagree, the victim is asked, and both learn its answer.

    Every query is made once and learnt from several times. Needs neither data nor weights; the first student is the
    copy.
    """

    needs = Access.QUERY
    data = ThiefData.NONE
    role = Role.BLACK_BOX
    buying = Buying.CHOSEN
    space = tries(diversity=(0.04, 0.2, 1.0), lr=(0.0001, 0.001), hard=(False, True))
    hard: bool = False
    """Learn the victim's top answer alone."""
    diversity: Weight = 0.2
    """Weight of the entropy of the mean answer, which keeps all classes in play (0.04 for 100 classes)."""
    replays: int = Field(3, ge=0, le=100)
    """Steps on images asked before, for each step on new ones."""
    memory: int = Field(10_000, ge=1, le=1_000_000)
    """Images that are kept for that, the newest."""
    lr: LearningRate = 1e-3
    """Learning rate of the generator, with Adam."""
    latent: int = Field(100, ge=1, le=10_000)
    width: int = Field(64, ge=1, le=1024)
    """Channels of the generator."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        second = fresh(1).to(fit.device)
        generator = Generator(data.shape, self.latent, self.width).to(fit.device)
        game = _Game(generator, self.lr, self.memory, data)

        def objective(first: nn.Module, batch: Batch) -> Terms:
            size, left = len(batch.images), oracle.ledger.left
            affordable = size if left is None else min(size, left)
            asks = game.steps % (1 + self.replays) == 0 and affordable > 0
            game.steps += 1
            if asks:
                made = generator.sample(affordable)
                game.learn(disagreeing([first(made), second(made)], self.diversity))
                asked = to_bytes(made)
                answer = oracle(Batch(to_float(asked), batch.labels, batch.index, batch.epoch))
                game.keep(asked, answer.filled)
            images, answers = game.newest(size) if asks and affordable == size else game.drawn(size)
            return {
                name: cross_entropy(student(images), answers.argmax(1)) if self.hard else kl(answers, student(images))
                for name, student in (("first", first), ("second", second))
            }

        extra, blank = [Extra(second)], without_images(data)
        student = fit(fresh(), blank, objective, extra=extra, beside=[generator], carried=[game], choose=False)
        fit.show(game.pictures())
        return student


def disagreeing(logits: Sequence[Tensor], diversity: float) -> Tensor:
    """Loss of images that is low where students disagree and, together, name all classes; logits (B, K) of each.

    Minus the mean standard deviation of the students' probabilities, minus `diversity` times the entropy of the mean.
    """
    p = torch.stack([one.float().softmax(1) for one in logits])
    mean = p.mean((0, 1))
    return -p.std(0).mean() + diversity * (mean * mean.clamp_min(1e-12).log()).sum()


class _Game(GeneratorTraining):
    """The generator, and the images that were asked with their answers; saved and restored with every checkpoint."""

    def __init__(self, generator: Generator, lr: float, memory: int, data: Split) -> None:
        super().__init__(generator, lr)
        self.memory, self.steps = memory, 0
        device = generator.expand.weight.device
        self.images = torch.empty(0, *data.shape, dtype=torch.uint8, device=device)
        self.answers = torch.empty(0, data.num_classes, device=device)

    def keep(self, images: Tensor, answers: Tensor) -> None:
        self.images = torch.cat([self.images, images])[-self.memory :]
        self.answers = torch.cat([self.answers, answers])[-self.memory :]

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """The images (B, C, H, W) in [0, 1] that were asked last, and their answers (B, K)."""
        return to_float(self.images[-count:]), self.answers[-count:]

    def drawn(self, count: int) -> tuple[Tensor, Tensor]:
        """Random images of those that are kept, and their answers."""
        index = torch.randint(len(self.images), (count,), device=self.images.device)
        return to_float(self.images[index]), self.answers[index]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"images": self.images, "answers": self.answers, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.images, self.answers, self.steps = state["images"], state["answers"], state["steps"]
