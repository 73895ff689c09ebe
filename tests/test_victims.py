"""Answers, responses over networks, runs that hold them, and what a thief with a budget gets."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import NASTY, RECIPE, STUDENT
from undistill.api import audit, protect
from undistill.attacks import Attack
from undistill.auditing.cell import Job
from undistill.auditing.pair import VictimPair
from undistill.core.errors import ModelError, SpecError, StoreError
from undistill.core.unshown import LOG_ZERO, UNSHOWN
from undistill.data import Data
from undistill.defences import Defence
from undistill.defences.defence import ResponseDefence
from undistill.models import Model
from undistill.models.trial import returned
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.training.fit import Fit
from undistill.training.losses import filled
from undistill.training.metrics import accuracy, evaluate
from undistill.victims.answer import Answer
from undistill.victims.oracle import Access, Oracle
from undistill.victims.protected import Protected, bare

CPU = torch.device("cpu")
P = torch.tensor([[0.62, 0.27, 0.11], [0.33, 0.36, 0.31]])


class Shares(nn.Module):
    """Answers `P` in turn, whatever it is asked."""

    def forward(self, images: Tensor) -> Tensor:
        return P.log().repeat(len(images), 1)[: len(images)]


def answer(defence: str, images: int = 2) -> Answer:
    shape = (1, 4, 4)
    network = Defence.parse(defence).protect(Shares(), Shares(), Shares, data(shape), Fit(RECIPE, 0, CPU))  # type: ignore[arg-type]
    return network.answer(torch.zeros(images, *shape))


def data(shape: tuple[int, int, int]) -> object:
    class Three:
        num_classes = 3

    Three.shape = shape
    return Three


def test_what_was_not_shown_is_filled_in_evenly() -> None:
    served = torch.tensor([[math.log(0.6), UNSHOWN, UNSHOWN], [math.log(0.5), math.log(0.5), UNSHOWN]])
    expected = torch.tensor([[0.6, 0.2, 0.2], [0.5, 0.5, 0.0]])
    assert torch.allclose(filled(served).exp(), expected, atol=1e-6)
    logits = torch.randn(4, 3)
    assert torch.equal(filled(logits), logits)


def test_rounding_by_hand() -> None:
    expected = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3]])  # the top class takes what rounding down leaves
    found = answer("Rounding(digits=1)")
    assert torch.allclose(found.log_p.exp(), expected, atol=1e-6)
    assert found.shown.all()
    assert torch.equal(answer("Rounding(digits=0)").top, P.argmax(1))


def test_top_k_by_hand() -> None:
    found = answer("TopK(k=2)")
    assert found.shown.tolist() == [[True, True, False], [True, True, False]]
    assert torch.allclose(found.log_p[found.shown].exp(), torch.tensor([0.62, 0.27, 0.33, 0.36]))
    assert (found.log_p[~found.shown] == LOG_ZERO).all()
    assert torch.allclose(found.filled.exp(), P, atol=1e-6), "one hidden class gets what is left"


RESPONSES = [spec for spec in Defence.registry if issubclass(Defence.registry[spec], ResponseDefence)]


@pytest.mark.parametrize("name", RESPONSES)
def test_responses_keep_their_promises(name: str, toy: Data, honest: Run) -> None:
    """On the simplex, the top class kept, row by row, the network untouched."""
    teacher = honest.network()
    network = Defence.parse(name).protect(teacher, teacher, lambda: honest.fresh(1), toy.split, Fit(RECIPE, 0, CPU))
    images = toy.test.pixels.float() / 255
    with torch.no_grad():
        whole, plain = network.answer(images), teacher(images)
        alone = torch.cat([network.answer(image[None]).log_p for image in images])
    assert torch.allclose(whole.filled.exp().sum(1), torch.ones(len(images)), atol=1e-4)
    flips = float((whole.top != plain.argmax(1)).float().mean())
    assert flips == 0 or not Defence.registry[name].keeps_top
    assert torch.allclose(alone.exp(), whole.log_p.exp(), atol=1e-4)
    assert torch.equal(network.answer(images).log_p, whole.log_p), "deterministic"
    assert bare(network) is teacher
    before = [value.clone() for value in network.responses.state_dict().values()]
    returned(network, Defence.parse(name), honest.shape, 3)  # also tried in training mode, as a run's network is
    network.train()(images)
    assert all(map(torch.equal, network.responses.state_dict().values(), before)), "responses are never in training"


MINE = """
import torch

from undistill import Answer, Response, ResponseDefence


class Blurred(Response):
    def __init__(self, share):
        super().__init__()
        self.register_buffer("share", torch.tensor(share))

    def forward(self, answer, inputs):
        p = answer.log_p.exp()
        return Answer(((1 - self.share) * p + self.share / p.shape[1]).log(), answer.shown)


class Blur(ResponseDefence):
    share: float = 0.5

    def response(self, shape, num_classes):
        return Blurred(self.share)
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:Blur"


def made(honest: Run, out: Path, *defences: str) -> Run:
    return protect(honest, defences, out, settings=Settings(recipe=RECIPE), device="cpu")


def test_composed_defences_are_recorded_and_rebuilt(honest: Run, victim: Run, toy: Data, tmp_path: Path, mine) -> None:
    """A trained defence and two responses, one of the user's own: the run opens as what was measured."""
    run = made(honest, tmp_path / "run", NASTY, f"{mine}(share=0.25)", "TopK(k=2)")
    assert [text.partition("(")[0].rpartition(":")[2] for text in run.record["defences"]] == ["Nasty", "Blur", "TopK"]
    network = Run.open(tmp_path / "run").network()
    assert [type(response).__name__ for response in network.responses] == ["Blurred", "Highest"]
    labels = toy.validation.labels
    assert accuracy(evaluate(network, toy.validation), labels) == run.record["metrics"]["validation_accuracy"]
    nasty = victim.network()
    assert all(map(torch.equal, nasty.state_dict().values(), bare(network).state_dict().values()))
    with torch.no_grad():
        p = nasty(images := toy.test.pixels[:5].float() / 255).softmax(1)
        blurred = (0.75 * p + 0.25 / 3).sort(descending=True).values[:, :2]
        shown = network.answer(images)
    assert torch.allclose(shown.log_p[shown.shown].exp().sort().values, blurred.flatten().sort().values, atol=1e-5)


def test_responses_of_strangers_are_not_executed(honest: Run, tmp_path: Path, mine, monkeypatch) -> None:
    run = made(honest, tmp_path / "run", mine)
    monkeypatch.setattr("undistill.core.code._trusted", set())
    with pytest.raises(ModelError, match="is code, and code named by a stored run is not executed"):
        Run.open(run.folder).network()
    Defence.from_user(mine)
    Run.open(run.folder).network()
    (tmp_path / "mine.py").write_text(MINE + "# a comment\n")
    Run.open(run.folder).network()
    (tmp_path / "mine.py").write_text(MINE.replace("/ p.shape[1]", "* 0.1"))
    with pytest.raises(StoreError, match=r"Blur.* has changed"):
        Run.open(run.folder).network()


def jobs(run: Run, attack: str, pool: str = "", **options: object) -> list[Job]:
    recipe = RECIPE.model_copy(update={"epochs": 4})
    pair = VictimPair.of(run, None, [0, 1], None, pool)
    return [Job(pair, "victim", Attack.parse(attack), Model.parse(STUDENT), seed, recipe, **options) for seed in (0, 1)]


def test_two_responses_never_share_a_cell(honest: Run, tmp_path: Path) -> None:
    """Their weights are the same; their answers are not."""
    runs = [made(honest, tmp_path / text, text) for text in ("Rounding(digits=1)", "Rounding(digits=2)", "TopK(k=1)")]
    assert len({run.digest for run in runs}) == 1
    assert len({job.key for run in runs for job in jobs(run, "SoftLabels()")}) == 6
    networks = [VictimPair.of(run, None, [0], None).victims["victim"] for run in runs]
    assert len({victim.identity for victim in networks}) == 3


def test_who_has_the_weights_strips_every_response(honest: Run, tmp_path: Path) -> None:
    run = made(honest, tmp_path / "run", "TopK(k=1)")
    stolen = Oracle(run.network(), Access.WEIGHTS).weights
    assert not isinstance(stolen, Protected)
    assert all(map(torch.equal, stolen.state_dict().values(), honest.network().state_dict().values()))


def test_a_protected_run_is_not_protected_again(honest: Run, victim: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="protected already"):
        made(victim, tmp_path / "a", "TopK(k=2)")
    with pytest.raises(SpecError, match="without a defence"):
        made(honest, tmp_path / "a")


def test_an_audit_of_responses(honest: Run, tmp_path: Path, mine) -> None:
    run = made(honest, tmp_path / "run", NASTY, mine, "Rounding(digits=1)")
    report = audit(run, tmp_path / "a", students=[STUDENT], seeds=1, defences=[mine], budget=2000, device="cpu")
    assert "Rounding(digits=1)" in report.title
    assert "stripped_with_the_weights" in {flag.name for flag in report.flags}
    for page in ("report.html", "report.md"):
        assert "a budget of 2,000 queries" in (tmp_path / "a" / page).read_text()
    assert (tmp_path / "a" / "report.html").exists()
    assert report.victim.accuracy == pytest.approx(
        accuracy(evaluate(run.network(), run.data().test), run.data().test.labels)
    )


class Warm(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) / 2


STRUCTURED = """
from tests.test_victims import Warm
from undistill import Defence


class Silent(Defence):
    def protect(self, current, honest, fresh, data, fit):
        return Warm(current)


class Said(Silent):
    def wrap(self, current, shape, num_classes):
        return Warm(current)
"""


def test_a_defence_of_another_structure_opens_again_or_is_refused(honest: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STRUCTURED)
    with pytest.raises(ModelError, match=r"Silent.*could not be opened again.*wrap\("):
        made(honest, tmp_path / "a", f"{tmp_path / 'mine.py'}:Silent")
    run = made(honest, tmp_path / "b", f"{tmp_path / 'mine.py'}:Said")
    assert isinstance(Run.open(run.folder).network(), Warm)


def test_two_responses_never_share_an_audit(honest: Run, tmp_path: Path) -> None:
    one, other = (made(honest, tmp_path / text, text) for text in ("Rounding(digits=1)", "Rounding(digits=2)"))
    audit(one, tmp_path / "audit", students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")
    with pytest.raises(StoreError, match="holds another run"):
        audit(other, tmp_path / "audit", students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")


def test_a_mended_response_is_another_victim(honest: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(honest, tmp_path / "run", "Rounding(digits=1)")
    (job, _) = jobs(run, "SoftLabels()")
    before = job.key
    monkeypatch.setattr("undistill.runs.run.source_sha256", lambda kind: f"edited {kind.__name__}")
    assert job.key != before
