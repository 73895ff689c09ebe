"""Defences that ask a network of their own: each formula against an independent computation."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.answers import BLANK, CPU, drawn, fixed, l1_program, response, shown
from tests.conftest import RECIPE, TEACHER
from undistill.core.errors import ModelError
from undistill.data import Data
from undistill.defences import Defence
from undistill.defences.responses.gradient_redirection import Redirected, redirected
from undistill.defences.responses.mad import Deviating, all_corners, deviated
from undistill.models import Model
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.training.fit import Fit
from undistill.training.losses import misinformation
from undistill.training.metrics import accuracy, evaluate


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


def gradients(surrogate: nn.Module, image: Tensor, parameters: list[Tensor], classes: int) -> Tensor:
    """Row k (K, D) is the gradient of log p_k(image) in `parameters`."""
    log_p = surrogate(image).double().log_softmax(1)[0]
    rows = [torch.autograd.grad(log_p[k], parameters, retain_graph=True) for k in range(classes)]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()


def test_slopes_of_gradient_redirection_are_sums_of_gradients() -> None:
    surrogate = Model.parse("ConvNet(width=2)").build((1, 12, 12), 4, 3).eval()
    images = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = Redirected(surrogate, epsilon=1.0).slopes(images)
    for row in range(3):
        G = gradients(surrogate, images[row : row + 1], list(surrogate.parameters()), 4)
        assert torch.allclose(found[row].double(), G.sum(1), rtol=1e-3, atol=1e-3)


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


def test_a_surrogate_that_does_not_fit_the_images_is_said() -> None:
    with pytest.raises(ModelError, match="needs 8 x 8 pixels"):
        response("MAD(surrogate='PlainCNN(width=8)')", 3, (1, 2, 2))
