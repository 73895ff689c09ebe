"""The promises of `Sealed`: an answer is a function of label and bucket, calibrated, with the top class kept."""

import math

import pytest
import torch
from torch import Tensor

from tests.answers import BLANK, calibrated, drawn, shown
from undistill.core.unshown import LOG_ZERO
from undistill.defences.responses.sealed import SealedAnswers, log_odds, merged, quantiles, sealed
from undistill.training.metrics import ece, nll
from undistill.victims.answer import Answer

RESTS = pytest.mark.parametrize("rest", ["uniform", "prior", "decoy"])


def overconfident(count: int, classes: int, seed: int, power: float = 2.0) -> tuple[Tensor, Tensor]:
    """Answers (N, K) that are too sure, and labels (N,) drawn from what they should have been."""
    p = drawn(count, classes, scale=2.0, seed=seed)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed)).flatten()
    sharp = p**power
    return sharp / sharp.sum(1, keepdim=True), labels


def response(rest: str, levels: int = 4, classes: int = 5, count: int = 250, seed: int = 0) -> SealedAnswers:
    p, labels = overconfident(count, classes, seed)
    found = calibrated(f"Sealed(levels={levels}, rest='{rest}')", p, labels).responses[0]
    assert isinstance(found, SealedAnswers)
    return found


def answers(found: SealedAnswers, p: Tensor) -> Tensor:
    return found(shown(p), BLANK).log_p


@RESTS
def test_an_answer_changes_with_label_and_bucket_alone(rest: str) -> None:
    """Random logits with the same top class and the same log-odds get the same bits, whatever the others are."""
    found, generator = response(rest), torch.Generator().manual_seed(3)
    for odds in torch.linspace(-1, 6, 15).tolist():
        top = 1 / (1 + math.exp(-odds))
        others = (0.05 * torch.randn(40, 4, generator=generator)).softmax(1).double() * (1 - top)
        p = torch.cat([others[:, :2], torch.full((40, 1), top), others[:, 2:]], 1)
        p = p[p.argmax(1) == 2]
        assert len(answers(found, p).unique(dim=0)) == 1
        assert len(p) == 40 or odds < 0


@RESTS
@pytest.mark.parametrize("levels", [1, 2, 4, 9])
def test_there_are_no_more_answers_than_classes_times_levels(rest: str, levels: int) -> None:
    found = response(rest, levels)
    p = torch.cat([drawn(2000, 5, scale, seed=8) for scale in (0.1, 1.0, 4.0, 20.0)])
    sealed_p = answers(found, p)
    for label in range(5):
        assert len(sealed_p[p.argmax(1) == label].unique(dim=0)) <= 2**found.bits + 1e-9 <= levels + 1e-9
    assert torch.equal(sealed_p.argmax(1), p.argmax(1)), "the top class stays"


def test_held_out_answers_are_calibrated() -> None:
    """Expected calibration error within sampling error of 0: the mean of four accuracies, each of 62 images."""
    p, labels = overconfident(20_000, 5, 1)
    before = ece(p.log(), labels)
    errors = [ece(answers(response("uniform", seed=seed), p), labels) for seed in range(6)]
    right = (p.argmax(1) == labels).double().mean()
    sampling = math.sqrt(2 / math.pi) * float((right * (1 - right) / 62).sqrt())  # mean deviation of a bucket
    assert before > 0.15
    assert sum(errors) / len(errors) < 1.2 * sampling
    found = response("uniform")
    assert nll(answers(found, p), labels) < nll(p.log(), labels)


def test_buckets_whose_accuracies_do_not_differ_become_one() -> None:
    values = torch.linspace(0, 1, 400)
    edges = quantiles(values, 4)
    assert edges.tolist() == pytest.approx([0.25, 0.5, 0.75], abs=2e-3)
    generator = torch.Generator().manual_seed(0)
    assert len(merged(edges, values, torch.rand(400, generator=generator) < 0.8)) == 0
    two = torch.where(values > 0.5, 0.95, 0.5) > torch.rand(400, generator=generator)
    assert merged(edges, values, two).tolist() == pytest.approx([0.5], abs=2e-3)
    assert len(merged(edges, values, values > torch.rand(400, generator=generator))) == 3
    assert response("uniform", levels=1).bits == 0


def test_equal_confidences_share_a_bucket() -> None:
    p = torch.tensor([[0.9, 0.1]]).double().repeat(250, 1)
    found = calibrated("Sealed(levels=4)", p, torch.arange(250) % 2).responses[0]
    assert isinstance(found, SealedAnswers)
    assert found.bits == 0
    assert answers(found, p)[0].exp().tolist() == pytest.approx([126 / 252, 126 / 252], abs=0.01)
    assert answers(found, p)[0].argmax() == 0, "the top class stays, even where it is right half the time"


def test_the_rest_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.85, 0.05], [0.2, 0.1, 0.7]]).double().repeat(60, 1)
    labels = torch.tensor([0, 1, 0] * 60)  # class 2 is always taken for 0
    tops = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]).double()
    for rest, expected in (
        ("uniform", [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]),
        ("prior", [[0, 61 / 62, 1 / 62], [121 / 122, 0, 1 / 122], [121 / 182, 61 / 182, 0]]),
        ("decoy", [[0, 0, 1], [0, 0, 1], [0, 1, 0]]),
    ):
        found = calibrated(f"Sealed(levels=1, rest='{rest}')", p, labels).responses[0]
        assert isinstance(found, SealedAnswers)
        table = answers(found, tops).double().exp()
        accuracy = 121 / 182  # 120 of 180 are right; one of each is added
        wanted = torch.eye(3).double() * accuracy + torch.tensor(expected).double() * (1 - accuracy)
        assert torch.allclose(table, wanted, atol=1e-6), rest


def test_no_other_class_exceeds_the_top_one() -> None:
    """Where a bucket is right less than half the time, what a decoy would have beyond the top class is spread."""
    decoy = torch.eye(4).roll(1, 1)
    table = sealed(torch.tensor([0.3, 0.1, 0.9]), decoy)
    assert torch.allclose(table.sum(2), torch.ones(4, 3))
    margin = 0.01 / 4
    assert table[0, 0].tolist() == pytest.approx([0.3, 0.3 - margin, 0.2 + margin / 2, 0.2 + margin / 2], abs=1e-5)
    assert table[0, 1].tolist() == pytest.approx([(1 + 3 * margin) / 4, *[(1 - margin) / 4] * 3], abs=1e-5)
    assert table[0, 2].tolist() == pytest.approx([0.9, 0.1, 0, 0], abs=1e-6)
    assert (table.argmax(2) == torch.arange(4)[:, None]).all()


def test_a_class_that_calibration_never_saw_falls_back_to_all_classes() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.85, 0.05]]).double().repeat(60, 1)
    found = calibrated("Sealed(levels=1, rest='decoy')", p, torch.arange(120) % 2).responses[0]
    assert isinstance(found, SealedAnswers)
    answer = answers(found, torch.tensor([[0.1, 0.2, 0.7]]).double())[0].exp()
    assert answer.argmax() == 2
    assert answer.tolist() == pytest.approx(
        [0, 1 - 121 / 122, 121 / 122], abs=1e-5
    ) or answer.tolist() == pytest.approx([1 - 121 / 122, 0, 121 / 122], abs=1e-5)
    means = p.log().mean(0)
    assert answer[int(means[:2].argmin())] > 0.005, "all of the rest goes to the class least like all answers"


def test_log_odds_tell_apart_what_rounding_calls_certain() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0], [60.0, 0.0, 0.0]])
    answer = Answer.of_logits(logits)
    assert answer.log_p[:, 0].exp().tolist() == [1.0, 1.0]
    assert log_odds(answer).tolist() == pytest.approx([40 - math.log(2), 60 - math.log(2)], rel=1e-5)
    hidden = Answer(torch.tensor([[0.0, LOG_ZERO]]), torch.tensor([[True, False]]))
    assert log_odds(hidden).isfinite().all()
