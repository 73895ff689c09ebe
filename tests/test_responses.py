"""Each defence that changes answers only, against an independent computation of its formula."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from tests.conftest import RECIPE, TEACHER
from undistill.core.errors import DataError, ModelError, SpecError
from undistill.core.unshown import LOG_ZERO
from undistill.data import Data, Samples, Split
from undistill.defences import Defence
from undistill.defences.defence import ResponseDefence
from undistill.defences.responses.gradient_redirection import Redirected, redirected
from undistill.defences.responses.mad import Deviating, all_corners, deviated
from undistill.defences.responses.model_guard_s import Quantised, codebook, medoids
from undistill.defences.responses.model_guard_w import guarded
from undistill.models import Model
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.training.fit import Fit
from undistill.training.losses import conditional_information, misinformation
from undistill.training.metrics import accuracy, evaluate
from undistill.victims.answer import Answer
from undistill.victims.protected import Protected, Response, with_response

CPU = torch.device("cpu")
RESPONSES = [f"{name}()" for name, spec in Defence.registry.items() if issubclass(spec, ResponseDefence)]
BLANK = torch.zeros(1, 1, 12, 12)


def drawn(rows: int, classes: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Random probabilities (rows, classes) in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=generator, dtype=torch.double)).softmax(1)


def shown(p: Tensor) -> Answer:
    return Answer.of_logits(p.log())


def response(text: str, classes: int, shape: tuple[int, int, int] = (1, 12, 12)) -> Response:
    defence = Defence.parse(text)
    assert isinstance(defence, ResponseDefence)
    return defence.response(shape, classes)


def changed(text: str, p: Tensor) -> Tensor:
    """The probabilities that a response makes of `p`."""
    return response(text, p.shape[1])(shown(p), BLANK.expand(len(p), -1, -1, -1)).log_p.double().exp()


def fixed(p: Tensor) -> nn.Module:
    """A network that answers the probabilities `p`, one row for each image."""

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return p.log().float()[: len(images)]

    return Fixed()


def calibrated(text: str, p: Tensor, labels: Tensor) -> Protected:
    """A network that answers `p` (N, K) to N images in turn, with a response that was calibrated on them."""
    samples = Samples(torch.arange(len(p), dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4), labels)
    split = Split(tuple(map(str, range(p.shape[1]))), samples, samples)
    protected = Defence.parse(text).protect(Numbered(p), Numbered(p), Numbered, split, Fit(RECIPE, 0, CPU))  # type: ignore[arg-type]
    assert isinstance(protected, Protected)
    return protected


class Numbered(nn.Module):
    """Answers the image whose pixels are n / 255 with row n of `p`."""

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.p = p

    def forward(self, images: Tensor) -> Tensor:
        return self.p.log().float()[(255 * images[:, 0, 0, 0]).round().long()]


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


def test_misinformation_mixes_in_wrong_answers_where_the_model_is_unsure() -> None:
    p, wrong = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05]]), torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]])
    mixing = response("AdaptiveMisinformation(tau=0.7, nu=1000)", 3)
    mixing.surrogate = fixed(wrong)
    found = mixing(shown(p), BLANK.expand(2, -1, -1, -1)).log_p.exp()
    assert torch.allclose(found, torch.stack([wrong[0], p[1]]), atol=1e-6)
    mixing.nu = 2.0
    a = 1 / (1 + math.exp(2.0 * (0.6 - 0.7)))
    found = mixing(shown(p), BLANK.expand(2, -1, -1, -1)).log_p.exp()
    assert torch.allclose(found[0], (1 - a) * p[0] + a * wrong[0], atol=1e-6)
    assert misinformation(p.log(), torch.tensor([0, 2])).item() == pytest.approx(
        -(math.log(0.4 + 1e-7) + math.log(0.95 + 1e-7)) / 2
    )


def test_misinformation_is_learnt(toy: Data, honest: Run) -> None:
    """The surrogate of a calibrated response is right less often than chance."""
    teacher = honest.network()
    protected = Defence.parse("AdaptiveMisinformation(epochs=6)").protect(
        teacher, teacher, lambda: honest.fresh(1), toy.split, Fit(RECIPE, 0, CPU)
    )
    assert accuracy(evaluate(protected.responses[0].surrogate, toy.test), toy.test.labels) < 0.1  # type: ignore[union-attr, arg-type, index]


def deviation(G: Tensor, y: Tensor, moved: Tensor) -> Tensor:
    """|| unit(G'y) - unit(G'y') ||^2 by its definition; G (K, D), y (K,)."""
    one, other = G.T @ y, G.T @ moved
    return (one / one.norm() - other / other.norm()).square().sum()


def gradients(surrogate: nn.Module, image: Tensor, parameters: list[Tensor], classes: int) -> Tensor:
    """Row k (K, D) is the gradient of log p_k(image) in `parameters`."""
    log_p = surrogate(image).double().log_softmax(1)[0]
    rows = [torch.autograd.grad(log_p[k], parameters, retain_graph=True) for k in range(classes)]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()


def test_mad_turns_the_gradient_of_the_last_layer_as_far_as_the_best_corner_does() -> None:
    """Against all corners of "the top class stays", by gradients of a real surrogate and the published definition."""
    classes, epsilon = 5, 1.0
    surrogate = Model.parse(TEACHER).build((1, 12, 12), classes, 3).eval()
    images = torch.rand(12, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    y = drawn(12, classes, scale=1.0)
    moved = Deviating(surrogate, epsilon=epsilon)(shown(y), images).log_p.double().exp()
    last = [module for module in surrogate.modules() if isinstance(module, nn.Linear)][-1]
    reached = []
    for row in range(12):
        G, top = gradients(surrogate, images[row : row + 1], [last.weight], classes), int(y[row].argmax())
        best = 0.0
        for size in range(classes):
            for others in itertools.combinations([k for k in range(classes) if k != top], size):
                corner = torch.zeros(classes).double()
                corner[[top, *others]] = 1 / (size + 1)
                step = min(1.0, epsilon / float((corner - y[row]).abs().sum()))
                best = max(best, float(deviation(G, y[row], torch.lerp(y[row], corner, step))))
        reached.append(float(deviation(G, y[row], moved[row])) / best)
        assert (moved[row] - y[row]).abs().sum() <= epsilon + 1e-3
        assert moved[row].argmax() == top
    assert min(reached) > 0.99, "all but the margin below the top class"


def test_mad_with_many_classes_keeps_its_promises() -> None:
    y, p = drawn(8, 40, seed=1), drawn(8, 40, seed=2)
    found = deviated(y, p, y.argmax(1), 0.5)
    cosine = nn.functional.cosine_similarity
    sets = torch.rand(8, 500, 40, generator=torch.Generator().manual_seed(3)) < torch.rand(500, 1)
    sets = sets.scatter(2, y.argmax(1)[:, None, None].expand(-1, 500, 1), True)
    random = sets / sets.sum(2, keepdim=True).double()
    random = torch.lerp(y[:, None], random, (0.5 / (random - y[:, None]).abs().sum(2, keepdim=True)).clamp_max(1))
    beaten = cosine((y - p)[:, None], random - p[:, None], dim=2).amin(1)
    assert (cosine(y - p, found - p) <= beaten + 5e-3).all()
    assert ((found - y).abs().sum(1) <= 0.5 + 1e-9).all()
    assert torch.allclose(found.sum(1), torch.ones(8).double())
    assert torch.equal(all_corners(y[:, :3], torch.tensor([2] * 8))[0], all_corners(y[:, :3], torch.tensor([2] * 8))[7])
    corners = {tuple(row) for row in all_corners(y[:1, :3], torch.tensor([2]))[0].tolist()}
    assert corners == {(0, 0, 1), (0.5, 0, 0.5), (0, 0.5, 0.5), (1 / 3, 1 / 3, 1 / 3)}


def test_gradient_redirection_is_the_best_answer_within_epsilon() -> None:
    y, slopes = drawn(20, 6), torch.randn(20, 6, generator=torch.Generator().manual_seed(4)).double()
    found = redirected(y, slopes, 0.8)
    for row in range(20):
        best = l1_program(-slopes[row].numpy(), y[row].numpy(), 0.8, top=None)
        assert float(slopes[row] @ found[row]) == pytest.approx(-best, abs=1e-8)
        assert (found[row] - y[row]).abs().sum() <= 0.8 + 1e-9
    assert torch.allclose(found.sum(1), torch.ones(20).double())


def test_slopes_of_gradient_redirection_are_sums_of_gradients() -> None:
    surrogate = Model.parse("ConvNet(width=2)").build((1, 12, 12), 4, 3).eval()
    images = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = Redirected(surrogate, epsilon=1.0).slopes(images)
    for row in range(3):
        G = gradients(surrogate, images[row : row + 1], list(surrogate.parameters()), 4)
        assert torch.allclose(found[row].double(), G.sum(1), rtol=1e-3, atol=1e-3)


def l1_program(cost: np.ndarray[Any, Any], y: np.ndarray[Any, Any], epsilon: float, top: int | None) -> float:
    """min cost'y' within ||y' - y||_1 <= epsilon on the simplex, by a linear program; `top` stays, by 1e-4."""
    K, eye = len(y), np.eye(len(y))
    rows = [np.r_[s * eye[k], -eye[k]] for s in (1, -1) for k in range(K)] + [np.r_[np.zeros(K), np.ones(K)]]
    bounds = [*y, *-y, epsilon]
    if top is not None:
        rows += [np.r_[eye[k] - eye[top], np.zeros(K)] for k in range(K) if k != top]
        bounds += [-1e-4] * (K - 1)
    ones = [np.r_[np.ones(K), np.zeros(K)]]
    return float(linprog(np.r_[cost, np.zeros(K)], rows, bounds, ones, [1], [(0, None)] * (2 * K)).fun)


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


OWN_SURROGATE = """
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes))
"""


def test_a_surrogate_of_the_users_own_is_trusted_when_he_names_it(
    honest: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN_SURROGATE)
    text = f"MAD(surrogate='{tmp_path / 'own.py'}:make', epochs=1)"
    run = protect(honest, text, tmp_path / "run", settings=Settings(recipe=RECIPE), device="cpu")
    assert any("own.py:make" in name for name in run.record["refers"])
    monkeypatch.setattr("undistill.core.code._trusted", set())
    with pytest.raises(ModelError, match="is not executed"):
        Run.open(run.folder).network()
    Defence.from_user(text)
    Run.open(run.folder).network()


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


def test_a_surrogate_that_does_not_fit_the_images_is_said() -> None:
    with pytest.raises(ModelError, match="needs 8 x 8 pixels"):
        response("MAD(surrogate='PlainCNN(width=8)')", 3, (1, 2, 2))
