"""Each defence that changes answers only, against an independent computation of its formula."""

import itertools
import math

import pytest
import torch
from torch import nn

from tests.answers import BLANK, Numbered, calibrated, changed, drawn, l1_program, response, shown
from undistill.core.errors import DataError, SpecError
from undistill.core.unshown import LOG_ZERO
from undistill.data import Data
from undistill.defences import Defence
from undistill.defences.defence import ResponseDefence
from undistill.defences.responses.model_guard_s import Quantised, codebook, medoids
from undistill.defences.responses.model_guard_w import guarded
from undistill.runs.run import Run
from undistill.training.losses import conditional_information
from undistill.victims.protected import Protected, with_response

RESPONSES = [f"{name}()" for name, spec in Defence.registry.items() if issubclass(spec, ResponseDefence)]


def test_label_only_by_hand() -> None:
    assert torch.equal(
        changed("LabelOnly()", torch.tensor([[0.2, 0.5, 0.3]])), torch.tensor([[0.0, 1.0, 0.0]]).double()
    )
    assert response("LabelOnly()", 3).bits == 0


def test_a_temperature_softens_and_a_fitted_one_calibrates() -> None:
    p = drawn(20, 5)
    expected = p ** (1 / 4) / (p ** (1 / 4)).sum(1, keepdim=True)
    assert torch.allclose(changed("Temperature(T=4)", p), expected, atol=1e-6)
    p = drawn(250, 4, scale=1.0)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0)).flatten()
    sharp = p**3 / (p**3).sum(1, keepdim=True)  # three times too sure
    protected = calibrated("Temperature(T=None)", sharp, labels)
    assert float(protected.responses[0].T) == pytest.approx(3, rel=0.25)  # type: ignore[arg-type]


def test_stingy_by_hand() -> None:
    p = torch.tensor([[0.02, 0.4, 0.1, 0.03, 0.2, 0.05, 0.06, 0.04, 0.07, 0.03]]).double()
    found = changed("Stingy(share=0.2)", p)
    assert torch.allclose(found[0, [1, 4]], torch.tensor([0.4, 0.2]).double() / 0.6, atol=1e-6)
    assert (found[0, [0, 2, 3, 5, 6, 7, 8, 9]] == 0).all()
    assert (changed("Stingy(share=0.1)", p)[0] == torch.eye(10)[1]).all()
    assert (changed("Stingy(share=0.1)", p[:, 1:3] * 2)[0] == torch.tensor([1, 0])).all(), "at least one is kept"


def test_reverse_sigmoid_moves_classes_above_one_half_too() -> None:
    """One public version clamps odds below 1, so that a class above 0.5 keeps its probability."""
    p = drawn(50, 5, scale=3.0)
    moved = p - 0.21 * ((0.2 * (p / (1 - p)).log()).sigmoid() - 0.5)
    assert torch.allclose(
        changed("ReverseSigmoid(beta=0.21, gamma=0.2)", p), moved / moved.sum(1, keepdim=True), atol=1e-5
    )
    sure = torch.tensor([[0.9, 0.05, 0.05]]).double()
    unnormalised = 0.9 - 0.21 * (1 / (1 + 9**-0.2) - 0.5)
    assert unnormalised < 0.9 - 0.02
    assert changed("ReverseSigmoid()", sure)[0, 0] < 0.9 - 0.02


def test_model_guard_w_solves_its_linear_program() -> None:
    """Also where the top value has to rise, which a search that never lets it rise gets wrong."""
    generator, rose = torch.Generator().manual_seed(0), 0
    for seed in range(120):
        classes = int(torch.randint(2, 12, (1,), generator=generator))
        scale, epsilon = (float(part) for part in torch.rand(2, generator=generator) * torch.tensor([6.0, 1.99]))
        epsilon, y = epsilon + 2e-4, drawn(1, classes, scale, seed)
        top = int(y.argmax())
        found = guarded(y, y.argmax(1), epsilon)[0]
        cost = y[0].clamp_min(1e-12).log()
        assert float(found @ cost) == pytest.approx(l1_program(cost.numpy(), y[0].numpy(), epsilon, top), abs=1e-6)
        assert (found - y[0]).abs().sum() <= epsilon + 1e-9
        assert found.sum() == pytest.approx(1)
        assert all(found[top] >= found[k] + 1e-4 - 1e-9 for k in range(classes) if k != top)
        rose += bool(found[top] > y[0, top] + 1e-6)
    assert rose > 3


def test_medoids_of_two_clusters_by_hand() -> None:
    points = torch.tensor([[0.9, 0.1], [0.88, 0.12], [0.86, 0.14], [0.6, 0.4], [0.58, 0.42], [0.56, 0.44]])
    found = medoids(points, 2)
    assert sorted(found[:, 0].tolist()) == pytest.approx([0.58, 0.88])
    assert len(medoids(points[:1].repeat(5, 1), 3)) == 1, "equal answers are one code"


def test_answers_that_are_given_often_count_often() -> None:
    points = torch.tensor([[0.9, 0.1]] * 97 + [[0.55, 0.45], [0.54, 0.46], [0.53, 0.47]])
    assert medoids(points, 1).tolist() == [pytest.approx([0.9, 0.1])]


def test_model_guard_s_quantises_the_first_query_too() -> None:
    """As released, its codebook starts empty, and the first query of a class gets the clean answer."""
    p = drawn(200, 4, scale=2.0)
    protected = calibrated("ModelGuardS(codes=3)", p, p.argmax(1))
    quantised = protected.responses[0]
    assert isinstance(quantised, Quantised)
    new = drawn(300, 4, scale=2.0, seed=9)
    first = [quantised(shown(row[None]), BLANK).log_p for row in new]
    again = quantised(shown(new), BLANK).log_p
    assert torch.equal(torch.cat(first), again), "no answer depends on what was asked before or beside it"
    assert not any(torch.allclose(row.exp().double(), mine, atol=1e-6) for row, mine in zip(again, new, strict=True))
    assert len(again.unique(dim=0)) <= 12
    assert torch.equal(again.argmax(1), new.argmax(1))
    assert quantised.bits == pytest.approx(math.log2(3))


def test_a_class_that_calibration_never_saw_gets_a_code_of_its_own() -> None:
    p = drawn(50, 4)
    p[:, 3] = 1e-3
    p = p / p.sum(1, keepdim=True)
    book = codebook(p, p.argmax(1), 2)
    assert book[3, 0].argmax() == 3
    assert book[3, 0, 3] == pytest.approx(float(p.amax(1).mean()), abs=1e-6)
    assert torch.allclose(book.sum(2), torch.ones(4, 2), atol=1e-5)


def test_conditional_information_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    mean = (p[0] + p[1]) / 2
    expected = sum(float((row * (row / mean).log()).sum()) for row in p[:2]) / 3
    assert conditional_information(p.log(), torch.tensor([0, 0, 1])).item() == pytest.approx(expected, rel=1e-5)


def test_a_linear_map_lowers_the_information_and_can_be_inverted() -> None:
    p = drawn(300, 4, scale=2.0)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0)).flatten()
    protected = calibrated("LinearCMI(weight=3)", p[:250], labels[:250])
    matrix = protected.responses[0].matrix
    mapped = protected.responses[0](shown(p), BLANK).log_p
    assert conditional_information(mapped, labels) < 0.5 * conditional_information(p.log(), labels)
    unnormalised = p.log() @ matrix.double().T
    back = torch.linalg.solve(matrix.double(), unnormalised.T).T
    assert torch.allclose(unnormalised.log_softmax(1), mapped.double(), atol=1e-5)
    assert torch.linalg.cond(matrix.double()) < 1000
    assert torch.allclose(back.exp(), p, atol=1e-6), "whoever learns the matrix undoes it, up to one number an answer"


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("Sealed(levels=0)", SpecError, "levels = 0 is refused"),
        ("MAD(epsilon=2.5)", SpecError, "epsilon = 2.5 is refused"),
        ("ModelGuardW(epsilon=3)", SpecError, "epsilon = 3 is refused"),
        ("MAD(surrogate='Nothing()')", SpecError, "No model named 'Nothing'"),
        ("GradientRedirection(surrogate='ConvNet(width=0)')", SpecError, "width = 0 is refused"),
        ("Sealed(levels=64)", DataError, r"needs 64 of them for 3 classes, and there are \d+\. Add images"),
        ("ModelGuardS(codes=64)", DataError, "needs 64 of them for 3 classes"),
        ("Sealed(levels=65)", SpecError, "levels = 65 is refused"),
    ],
)
def test_bad_settings_end_in_one_sentence(
    text: str, error: type[Exception], match: str, toy: Data, honest: Run
) -> None:
    with pytest.raises(error, match=match) as caught:
        Defence.parse(text).check(honest.network(), toy.split)
    assert "\n" not in str(caught.value)


def test_what_is_zero_or_hidden_before_a_response_stays_finite() -> None:
    """Responses over rounded and cut answers, in which probabilities are 0 or not shown."""
    p = drawn(30, 6, scale=4.0)
    for before, after in itertools.product(("Rounding(digits=1)", "TopK(k=2)", "LabelOnly()"), RESPONSES):
        network = with_response(with_response(Numbered(p), response(before, 6)), response(after, 6))
        images = (torch.arange(30)[:, None, None, None] / 255).expand(-1, 1, 12, 12)
        answer = network.answer(images)
        assert answer.log_p.isfinite().all(), (before, after)
        assert answer.log_p.min() >= LOG_ZERO
        assert torch.allclose(answer.filled.exp().sum(1), torch.ones(30), atol=1e-3), (before, after)


@pytest.mark.parametrize("text", RESPONSES)
def test_responses_work_under_autocast(text: str) -> None:
    """Audits may run in bf16; answers stay what they are in fp32, but for the rounding of a surrogate."""
    inputs = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    made, p = response(text, 4).eval(), drawn(6, 4)
    with torch.no_grad():
        exact = made(shown(p), inputs).log_p
        with torch.autocast("cpu", torch.bfloat16):
            rounded = made(shown(p), inputs).log_p
    assert rounded.dtype == torch.float32
    assert torch.allclose(exact.exp(), rounded.exp(), atol=0.02) or made.reads_inputs


def test_bits_of_composed_responses() -> None:
    def over(*texts: str) -> Protected:
        network: nn.Module = Numbered(drawn(3, 3))
        for text in texts:
            network = with_response(network, response(text, 3))
        assert isinstance(network, Protected)
        return network

    assert over("Rounding()").bits is None
    assert over("LabelOnly()", "Temperature(T=4)").bits == 0, "what is made of an answer tells no more than it does"
    assert over("LabelOnly()", "MAD()").bits is None, "its surrogate sees the image again"
    assert over("MAD()", "LabelOnly()").bits == 0
