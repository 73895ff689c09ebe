"""The formula of every attack, against one that is computed in another way."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import RECIPE, students
from tests.test_victims import jobs
from undistill.attacks import Attack
from undistill.attacks.adaptive.averager import ClassMeans
from undistill.attacks.adaptive.htc import HTC
from undistill.attacks.adaptive.mkd import MKD, Markov
from undistill.attacks.black_box.disguide import disagreeing
from undistill.attacks.distillation.dist import correlation
from undistill.attacks.distillation.dkd import decoupled
from undistill.attacks.distillation.logit_matching import LogitMatching
from undistill.attacks.distillation.lskd import LSKD, standardised
from undistill.attacks.recovery.p_bayes import recovered
from undistill.core.progress import Progress
from undistill.core.seeds import seeded
from undistill.core.unshown import LOG_ZERO
from undistill.data import Data, Samples
from undistill.data.batches import Batch, ViewDataset
from undistill.data.views import Views, to_float
from undistill.defences.responses.rounding import Rounded
from undistill.runs.run import Run
from undistill.training.fit import Fit
from undistill.training.losses import distillation, kl
from undistill.training.metrics import accuracy, evaluate
from undistill.victims.answer import Answer
from undistill.victims.bought import Bought
from undistill.victims.oracle import Access, Oracle
from undistill.victims.protected import Protected

CPU = torch.device("cpu")
RANDOM = torch.Generator().manual_seed(0)
TEACHER, LOGITS = (3 * torch.randn(6, 4, generator=RANDOM) for _ in range(2))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
BATCH = Batch(torch.zeros(6, 1, 2, 2), LABELS, torch.arange(6), 0)


class Fixed(nn.Module):
    """Gives the same logits to whatever it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        return LOGITS


def loss(attack: Attack, teacher: Tensor = TEACHER) -> dict[str, float]:
    """The terms of a `Distillation`, with their weights."""
    terms = attack.objective(Fixed(), BATCH, Answer.of_logits(teacher))  # type: ignore[attr-defined]
    return {name: float(term[0] * term[1] if isinstance(term, tuple) else term) for name, term in terms.items()}


def softmax(logits: Tensor, T: float = 1.0) -> np.ndarray:
    e = np.exp(logits.double().numpy() / T)
    return e / e.sum(1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum(1).mean())


def test_soft_only_by_hand() -> None:
    p, q = softmax(TEACHER, 2), softmax(LOGITS, 2)
    assert loss(Attack.parse("SoftOnly(T=2)")) == {"soft": pytest.approx(4 * divergence(p, q), rel=1e-4)}


def test_htc_by_hand() -> None:
    ce = float(F.cross_entropy(LOGITS, LABELS))
    one = divergence(softmax(TEACHER, 50), softmax(LOGITS))
    assert loss(HTC()) == {"soft": pytest.approx(0.9 * one, rel=1e-3), "ce": pytest.approx(0.1 * ce, rel=1e-4)}
    both = 2500 * divergence(softmax(TEACHER, 50), softmax(LOGITS, 50))
    assert loss(HTC(sides="both"))["soft"] == pytest.approx(0.9 * both, rel=1e-2)


def test_dkd_by_hand() -> None:
    p, q, rows = softmax(TEACHER, 3), softmax(LOGITS, 3), np.arange(6)
    binary = [np.stack([one[rows, LABELS], 1 - one[rows, LABELS]], 1) for one in (p, q)]
    others = [np.stack([np.delete(row, label) for row, label in zip(one, LABELS, strict=True)]) for one in (p, q)]
    others = [one / one.sum(1, keepdims=True) for one in others]
    target, rest = decoupled(TEACHER, LOGITS, LABELS, 3.0)
    assert float(target) == pytest.approx(9 * divergence(*binary), rel=1e-4)
    assert float(rest) == pytest.approx(9 * divergence(*others), rel=1e-4)


def test_dkd_is_plain_distillation_with_the_victims_own_weight() -> None:
    """KL = target + (1 - p_label) others, for each image (the paper's eq. 5)."""
    for row in range(6):
        one, other, label = TEACHER[row : row + 1], LOGITS[row : row + 1], LABELS[row : row + 1]
        target, rest = decoupled(one, other, label, 1.0)
        p = float(one.softmax(1)[0, label])
        assert float(target + (1 - p) * rest) == pytest.approx(float(kl(one, other)), rel=1e-4)


def test_dkd_stands_answers_that_show_one_class() -> None:
    shown = Answer.of_logits(torch.tensor([[500.0, 0, 0, 0]]))
    assert all(map(torch.isfinite, decoupled(shown.filled, LOGITS[:1], LABELS[:1], 4.0)))


def test_dist_by_hand() -> None:
    p, q = softmax(TEACHER, 4), softmax(LOGITS, 4)
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    found = loss(Attack.parse("DIST(T=4, beta=2, gamma=3)"))
    assert found["images"] == pytest.approx(16 * 2 * (1 - rows), rel=1e-3)
    assert found["classes"] == pytest.approx(16 * 3 * (1 - columns), rel=1e-3)


def test_correlation_has_a_gradient_where_all_is_equal() -> None:
    flat = torch.zeros(2, 3, requires_grad=True)
    correlation(flat, torch.ones(2, 3)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_lskd_does_not_change_with_scale_and_shift() -> None:
    plain = loss(LSKD())["soft"]
    assert loss(LSKD(), 7 * TEACHER + 3)["soft"] == pytest.approx(plain, rel=1e-3)
    assert loss(LSKD(), TEACHER / 5)["soft"] == pytest.approx(plain, rel=1e-3)
    assert loss(Attack.parse("SoftLabels()"), 7 * TEACHER)["soft"] != pytest.approx(
        loss(Attack.parse("SoftLabels()"))["soft"], rel=0.1
    )
    a, b = ((one - one.mean(1, keepdim=True)) / one.std(1, keepdim=True) for one in (TEACHER, LOGITS))
    assert plain == pytest.approx(9 * 4 * divergence(softmax(a, 2), softmax(b, 2)), rel=1e-3)


def test_equal_logits_have_a_standard_form_and_a_gradient() -> None:
    flat = torch.ones(2, 3, requires_grad=True)
    standardised(flat).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_logit_matching_is_regression_on_centred_logits() -> None:
    found = loss(LogitMatching(alpha=1, floor=1e-30))["match"]
    a, b = (one - one.mean(1, keepdim=True) for one in (TEACHER, LOGITS))
    assert found == pytest.approx(float((a - b).square().mean()), rel=1e-4)
    hidden = torch.tensor([[500.0, 0, 0, 0]]).expand(6, 4)
    assert loss(LogitMatching(alpha=1, floor=1e-4), hidden)["match"] < 200, "zeros are believed to be 1e-4"


def test_averager_means_over_the_epoch_by_class() -> None:
    means, log_p = ClassMeans(4, CPU), TEACHER.log_softmax(1)
    first = means(log_p[:3], LABELS[:3], 0)
    assert torch.allclose(first, log_p[:3], atol=1e-5), "each class was seen once"
    second = means(log_p[3:], LABELS[3:], 0)
    expected = (log_p[0].exp() + log_p[4].exp()) / 2
    assert torch.allclose(second[1].exp(), expected, atol=1e-6)
    assert torch.allclose(means(log_p[:3], LABELS[:3], 1), log_p[:3], atol=1e-5), "a new epoch begins anew"
    shares = torch.tensor([[0.5, 0.5, 0, 0]])
    mixed = ClassMeans(4, CPU)(log_p[:1], shares, 0)
    assert torch.allclose(mixed.exp(), log_p[:1].exp(), atol=1e-6)


def test_columns_of_a_markov_matrix_sum_to_one_and_the_identity_is_plain_distillation() -> None:
    matrices = Markov(4, rank=3)
    with torch.no_grad():
        matrices.u.normal_()
        matrices.v.normal_()
    matrix = matrices.of(LABELS).exp()
    assert torch.allclose(matrix.sum(1), torch.ones(6, 4), atol=1e-5)
    p = TEACHER.softmax(1)
    by_hand = torch.stack([matrix[row] @ p[row] for row in range(6)])
    assert torch.allclose(matrices(TEACHER, LABELS).exp(), by_hand, atol=1e-5)
    assert torch.allclose(by_hand.sum(1), torch.ones(6), atol=1e-5)
    with torch.no_grad():
        matrices.s.fill_(1e4)
        matrices.u.zero_()
    assert distillation(matrices(TEACHER, LABELS), LOGITS, 4) == distillation(TEACHER.log_softmax(1), LOGITS, 4)


def test_mkd_with_matrices_that_stand_still_is_plain_distillation(
    toy: Data, honest: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("undistill.attacks.adaptive.mkd.DIAGONAL", 1e4)
    data = toy.attackers(0.1, 0)
    mkd, plain = (
        attack.run(Oracle(honest.network(), Access.QUERY), students(toy), data, Fit(RECIPE, 0, CPU))
        for attack in (MKD(speed=1e-9), Attack.parse("SoftLabels()"))
    )
    for a, b in zip(mkd.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-3)


def test_what_was_bought_once_is_the_answer_to_every_view(toy: Data, honest: Run) -> None:
    oracle = Oracle(honest.network(), Access.QUERY)
    bought, index = Bought.of(oracle, toy.split), torch.tensor([5, 0, 7])
    whole = oracle.once(toy.train, 3).log_p
    assert oracle.ledger.billed == len(toy.train)
    mixed = ViewDataset(toy.train, Views(mixup=1.0), 0, 3)
    images, shares = mixed.show(4, index)
    found = bought(Batch.of(mixed, 4, index, to_float(images), shares)).log_p.exp()
    mixture = mixed.views.mixture(toy.train, 0, 4, index)
    assert mixture is not None
    share = mixture.share[:, None]
    expected = share * whole[index].exp() + (1 - share) * whole[mixture.partner].exp()
    assert torch.allclose(found, expected, atol=1e-5)
    plain = ViewDataset(toy.train, Views(), 0, 3)
    assert torch.equal(bought(Batch.of(plain, 0, index, to_float(plain.show(0, index)[0]), shares)).log_p, whole[index])


def test_recovered_answers_are_closer_to_the_truth_than_the_defended_ones() -> None:
    torch.manual_seed(0)
    truth = torch.distributions.Dirichlet(torch.full((200, 4), 0.7)).sample().clamp_min(1e-4)
    truth = truth / truth.sum(1, keepdim=True)
    rounded = Rounded(0)

    def defended(log_p: Tensor) -> Tensor:
        return rounded(Answer(log_p, torch.ones_like(log_p, dtype=torch.bool)), torch.empty(0)).filled

    shown = defended(truth.log()).exp()
    near = (truth + 0.1 * torch.rand(200, 4)).clamp_min(1e-4)
    found = recovered(shown, near / near.sum(1, keepdim=True), defended, 8.0, 40)
    assert torch.allclose(found.sum(1), torch.ones(200), atol=1e-4)
    assert torch.equal(found.argmax(1), shown.argmax(1))
    error = [(one - truth).abs().sum(1).mean() for one in (found, shown)]
    assert error[0] < 0.5 * error[1]


def test_an_answer_that_no_guess_explains_is_taken_as_it_is() -> None:
    shown, far = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert torch.equal(recovered(shown, far, lambda log_p: log_p, 1000.0, 5), shown)


def test_only_who_knows_the_defence_can_try_it(honest: Run) -> None:
    victim = Protected(honest.network(), [Rounded(0)]).eval()
    guess = Answer.of_logits(torch.tensor([[2.0, 1.0, 0.0]]))
    knowing, other = Oracle(victim, Access.QUERY, told="Rounding(digits=0)"), Oracle(victim, Access.QUERY)
    assert torch.equal(
        knowing.defended(guess, torch.zeros(1, 1, 12, 12)).log_p, torch.tensor([[0, LOG_ZERO, LOG_ZERO]])
    )
    assert other.defended(guess, torch.zeros(1, 1, 12, 12)) is guess
    assert knowing.ledger.billed == 0


def test_fix_match_that_is_never_sure_is_supervised_training(toy: Data, honest: Run) -> None:
    data = toy.attackers(0.1, 0).unlabelled.some(30, 0)

    def guessing(text: str) -> tuple[Tensor, list[float]]:
        fit = Fit(RECIPE, 0, CPU)
        with seeded(0):
            network = Attack.parse(text).run(Oracle(honest.network(), Access.QUERY), students(toy), data, fit)
        return evaluate(network, toy.test), [epoch["guessed"] for epoch in fit.history]

    never, guessed = guessing("FixMatch(threshold=1)")
    assert set(guessed) == {0.0}
    assert torch.equal(never, guessing("FixMatch(weight=0)")[0])
    assert not torch.equal(never, guessing("FixMatch(threshold=0)")[0])


def test_disagreement_by_hand_and_its_generator_raises_it() -> None:
    p = np.stack([softmax(TEACHER), softmax(LOGITS)])
    mean = p.mean((0, 1))
    expected = -p.std(0, ddof=1).mean() + 0.2 * (mean * np.log(mean)).sum()
    assert float(disagreeing([TEACHER, LOGITS], 0.2)) == pytest.approx(expected, rel=1e-4)
    assert disagreeing([TEACHER, TEACHER], 0) == 0
    images = torch.zeros(8, 3, requires_grad=True)
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    optimiser = torch.optim.Adam([images], 0.1)
    values = []
    for _ in range(50):
        lost = disagreeing([first(images), second(images)], 0.0)
        optimiser.zero_grad()
        lost.backward()
        optimiser.step()
        values.append(lost.item())
    assert values[-1] < 1.5 * values[0] < 0


def test_a_fine_tuned_copy_begins_with_the_weights_without_responses(toy: Data, honest: Run) -> None:
    victim = Protected(honest.network(), [Rounded(0)]).eval()
    attack, fit = Attack.parse("FineTune(epochs=1, share=0.1)"), Fit(RECIPE, 0, CPU)
    copy = attack.run(Oracle(victim, Access.WEIGHTS), students(toy), toy.attackers(0.1, 0), fit)
    assert type(copy) is type(honest.network())
    assert accuracy(evaluate(copy, toy.test), toy.test.labels) > 0.6
    assert len(fit.history) == 1


def test_a_mixture_of_two_top_answers_holds_both() -> None:
    top = Answer(torch.tensor([[0.0, LOG_ZERO], [LOG_ZERO, 0.0]]), torch.eye(2, dtype=torch.bool))
    dataset = ViewDataset(Samples(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2)), Views(mixup=1.0), 3, 2)
    index = torch.tensor([0, 1])
    images, shares = dataset.show(0, index)
    found = Bought(top)(Batch.of(dataset, 0, index, to_float(images), shares)).filled.exp()
    assert torch.allclose(found, shares, atol=1e-5), "as the labels are mixed"


def test_the_designers_bound_keeps_a_budget(victim: Run, tmp_path: Path) -> None:
    job = jobs(victim, "PBayes(oracle=True, draws=2)", budget=40)[0]
    cell = job.run(tmp_path / "cells", Progress.silent())
    assert not cell.diverged
    assert 0 < cell.queries <= 40
