"""The formula of every attack, against one that is computed in another way."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import RECIPE, students
from tests.test_victims import jobs
from undistill.attacks import Attack
from undistill.attacks.adaptive.affine_map import Affine
from undistill.attacks.adaptive.htc import HTC
from undistill.attacks.adaptive.mkd import MKD, Markov
from undistill.attacks.black_box.disguide import _Game, disagreeing
from undistill.attacks.data_free.synthesis import Generator
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
from undistill.training.class_means import ClassMeans
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
    """Others of which the victim shows nothing are equally likely, whatever T is; the label is none of them."""
    shown = Answer(torch.tensor([[0.0, *[LOG_ZERO] * 3]]), torch.ones(1, 4, dtype=torch.bool))
    for T in (0.5, 1.0, 4.0):
        q = softmax(LOGITS[:1, 1:], T)
        expected = T * T * divergence(np.full((1, 3), 1 / 3), q)
        assert float(decoupled(shown.filled, LOGITS[:1], LABELS[:1], T)[1]) == pytest.approx(expected, rel=1e-4)


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
    plain = loss(LSKD(floor=1e-40))["soft"]
    assert loss(LSKD(floor=1e-40), 7 * TEACHER + 3)["soft"] == pytest.approx(plain, rel=1e-3)
    assert loss(LSKD(), TEACHER / 5)["soft"] == pytest.approx(plain, rel=1e-3)
    assert loss(Attack.parse("SoftLabels()"), 7 * TEACHER)["soft"] != pytest.approx(
        loss(Attack.parse("SoftLabels()"))["soft"], rel=0.1
    )
    a, b = ((one - one.mean(1, keepdim=True)) / one.std(1, keepdim=True) for one in (TEACHER, LOGITS))
    assert plain == pytest.approx(9 * 4 * divergence(softmax(a, 2), softmax(b, 2)), rel=1e-3)


def test_lskd_reads_a_floor_where_answers_were_rounded_to_zero() -> None:
    rounded = torch.tensor([[0.9, 0.1, 0.0, 0.0]]).log().clamp_min(LOG_ZERO).expand(6, 4)
    believed = torch.tensor([[0.9, 0.1, 1e-3, 1e-3]]).log().expand(6, 4)
    teacher = (believed - believed.mean(1, keepdim=True)) / believed.std(1, keepdim=True)
    student = (LOGITS - LOGITS.mean(1, keepdim=True)) / LOGITS.std(1, keepdim=True)
    expected = 9 * 4 * divergence(softmax(teacher, 2), softmax(student, 2))
    assert loss(LSKD(floor=1e-3), rounded)["soft"] == pytest.approx(expected, rel=1e-3)


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


def test_class_means_are_not_rounded_by_autocast() -> None:
    exact = ClassMeans(4, CPU)(TEACHER.log_softmax(1), LABELS, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ClassMeans(4, CPU)(TEACHER.log_softmax(1), LABELS, 0), exact)


@pytest.mark.parametrize(
    ("hide", "matrix", "left"),
    [
        (lambda z: z / 6, False, (0, 0.03)),
        (lambda z: -z, False, (0, 0.03)),
        (lambda z: z[:, [3, 0, 1, 2]], False, (0.03, 1)),
        (lambda z: z[:, [3, 0, 1, 2]], True, (0, 0.03)),
    ],
    ids=["temperature", "reversed", "exchanged", "exchanged, with a matrix"],
)
def test_an_affine_map_finds_what_a_defence_hid(
    hide: Callable[[Tensor], Tensor], matrix: bool, left: tuple[float, float]
) -> None:
    """A temperature, a reversed ranking, with a matrix exchanged classes: labels teach the map what answers were."""
    generator = torch.Generator().manual_seed(0)
    truth = 3 * torch.randn(4000, 4, generator=generator)
    labels = torch.multinomial(truth.softmax(1), 1, generator=generator).flatten()
    answer = Answer.of_logits(hide(truth))
    affine = Affine(4, matrix=matrix)
    before = float(kl(truth, affine(answer)).detach())
    optimiser = torch.optim.Adam(affine.parameters(), 0.05)
    for _ in range(300):
        optimiser.zero_grad()
        F.cross_entropy(affine(answer), labels).backward()
        optimiser.step()
    assert left[0] <= float(kl(truth, affine(answer)).detach()) / before < left[1]


def test_a_chain_passes_on_what_its_members_agree_on(toy: Data, honest: Run) -> None:
    data, oracle = toy.attackers(0.1, 0), Oracle(honest.network(), Access.QUERY)
    with seeded(0):
        found = Attack.parse("Chain(n=3, T=2, alpha=0.5)").run(oracle, students(toy), data, Fit(RECIPE, 0, CPU))
    members: list[nn.Module] = []
    fit = Fit(RECIPE, 0, CPU)

    def objective(student: nn.Module, batch: Batch) -> Tensor:
        logits = student(batch.images)
        with torch.no_grad():
            told = [member(batch.images).softmax(1) for member in members or [honest.network()]]
        soft = distillation(torch.stack(told).mean(0).log(), logits, 2.0)
        return {"loss": 0.5 * soft + 0.5 * F.cross_entropy(logits, batch.labels)}

    with seeded(0):
        for number in range(3):
            members.append(fit(students(toy)(number), data, objective).eval())
    assert torch.allclose(evaluate(found, toy.test), evaluate(members[-1], toy.test), atol=0.05)


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
    assert not torch.equal(never, guessing("FixMatch(threshold=0)")[0])
    top = honest.network()(to_float(data.train.pixels)).argmax(1)
    draws = Fit(RECIPE, 0, CPU)
    plain = draws.views(data.train[torch.arange(len(data.everything)) % 30], RECIPE.views, "labelled")

    def supervised(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        drawn = torch.randint(len(data.everything), (math.ceil(len(batch.images) / 7),))
        images = to_float(plain.show(batch.epoch, drawn)[0])
        return {"ce": F.cross_entropy(student(images), top[drawn % 30])}

    with seeded(0):
        network = draws(students(toy)(), replace(data, train=data.everything), supervised)
    assert torch.allclose(never, evaluate(network, toy.test), atol=1e-4)


def test_disagreement_by_hand() -> None:
    p = np.stack([softmax(TEACHER), softmax(LOGITS)])
    mean = p.mean((0, 1))
    expected = -p.std(0, ddof=1).mean() + 0.2 * (mean * np.log(mean)).sum()
    assert float(disagreeing([TEACHER, LOGITS], 0.2)) == pytest.approx(expected, rel=1e-4)
    assert disagreeing([TEACHER, TEACHER], 0) == 0


def test_the_generator_of_disguide_raises_disagreement(toy: Data) -> None:
    torch.manual_seed(0)
    generator, (first, second) = Generator(toy.shape, 8, 8), (students(toy)(number) for number in range(2))
    game, values = _Game(generator, 0.01, 10, toy.split), []
    for _ in range(40):
        made = generator.sample(32)
        lost = disagreeing([first(made), second(made)], 0.0)
        game.learn(lost)
        values.append(lost.item())
    assert statistics.fmean(values[-5:]) < 1.2 * statistics.fmean(values[:5]) < 0


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
