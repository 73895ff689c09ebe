"""Recovery of answers from a known defence (pBayes, after Tang et al., NDSS 2024)."""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from undistill.attacks.attack import Fresh, QueryAttack, Role, tries
from undistill.core.spec import Temperature
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation
from undistill.training.objectives import Objective, Terms, Weighted
from undistill.training.recipe import Recipe
from undistill.victims.answer import Answer, Form
from undistill.victims.oracle import Access, Oracle

CLOSE = 0.01  # L1 distance within which a defended guess counts as what was observed
LEAST = 1e-4  # probability in a guess, so that its distribution has every class
TINY = 1e-30


class PBayes(QueryAttack):
    """Of many guesses at the undefended answer, the mean of those that the defence would turn into what was observed.

    The thief knows the defence. Guesses are drawn around his student's answer, first that of one who learnt from the
    answers as they came. `oracle` draws them around the true undefended answer, as published code does: no thief has
    it, but no recovery of this kind can be better, which a designer of defences wants to know.
    """

    form = Form.TOP
    space = tries(T=(1.0, 4.0), alpha=(0.5, 0.9), c=(2.0, 8.0))
    T: Temperature = 4.0
    alpha: float = Field(0.9, ge=0, le=1)
    """Weight of imitation against the thief's own labels."""
    c: float = Field(8.0, gt=0, le=10_000)
    """Concentration of the guesses: Dirichlet(K c p) around a centre p."""
    draws: int = Field(20, ge=1, le=10_000)
    """Guesses for each answer."""
    rounds: int = Field(2, ge=1, le=100)
    """Students that learn from recovered answers, each from guesses around the one before it."""
    oracle: bool = False

    @property
    def role(self) -> Role:  # type: ignore[override]
        return Role.BOUND if self.oracle else Role.RECOVERY

    @property
    def needs(self) -> Access:  # type: ignore[override]
        """The oracle's centres come from the network without its responses."""
        return Access.WEIGHTS if self.oracle else Access.QUERY

    def queries_per_image(self, recipe: Recipe) -> int:
        """Every student asks for each of its views anew, unless answers were bought once."""
        students = 1 if self.oracle or self.once else 1 + self.rounds
        return students * super().queries_per_image(recipe)

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        ask = self.asking(oracle, data)
        if self.oracle:
            return fit(fresh(), data, self._objective(oracle, ask, fit.answers(oracle.weights)))
        student = fit(fresh(), data, self._objective(oracle, ask, None))
        for number in range(1, self.rounds + 1):
            student = fit(fresh(number), data, self._objective(oracle, ask, fit.answers(student)))
        return student

    def _objective(
        self, oracle: Oracle, ask: Callable[[Batch], Answer], guess: Callable[[Batch], Tensor] | None
    ) -> Objective:
        def objective(student: nn.Module, batch: Batch) -> Terms:
            logits, answer = student(batch.images), ask(batch)
            target = answer.filled
            if guess is not None:

                def defended(log_p: Tensor) -> Tensor:
                    repeated = batch.images.repeat(self.draws, 1, 1, 1)
                    return oracle.defended(Answer(log_p, torch.ones_like(log_p, dtype=torch.bool)), repeated).filled

                centre = guess(batch).float().softmax(1)
                target = recovered(target.exp(), centre, defended, self.c, self.draws).clamp_min(TINY).log()
            soft, ce = distillation(target, logits, self.T), cross_entropy(logits, batch.labels)
            return {"soft": Weighted(soft, self.alpha), "ce": Weighted(ce, 1 - self.alpha)}

        return objective


def recovered(observed: Tensor, centre: Tensor, defended: Callable[[Tensor], Tensor], c: float, draws: int) -> Tensor:
    """Probabilities (B, K) that explain those `observed` (B, K), guessed around `centre` (B, K).

    `defended` maps log-probabilities (draws * B, K) to what the defence would show. The guesses that count have the
    same top class as `observed` and are within 0.01 of it (L1) once defended, or else are the closest. An answer for
    which no guess has its top class is taken as it is.
    """
    classes = observed.shape[1]
    spread = torch.distributions.Dirichlet(classes * c * centre.clamp_min(LEAST), validate_args=False)
    guesses = spread.sample((draws,))
    shown = defended(guesses.clamp_min(TINY).log().flatten(0, 1)).exp().view_as(guesses)
    right = guesses.argmax(2) == observed.argmax(1)
    distance = (shown - observed).abs().sum(2).masked_fill(~right, torch.inf)
    counts = right & (distance <= distance.min(0).values.clamp_min(CLOSE))
    weight = counts.float().unsqueeze(2)
    mean = (weight * guesses).sum(0) / weight.sum(0).clamp_min(1)
    return torch.where(right.any(0)[:, None], mean, observed)
