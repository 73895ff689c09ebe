"""The method in one screen and the package are the same numbers."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from undistill.data import Samples, Split
from undistill.data.views import Views
from undistill.defences.nasty import Nasty
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation, undermining
from undistill.training.recipe import Recipe

FILE = Path(__file__).parents[1] / "examples" / "nasty_in_one_screen.py"


@pytest.fixture(scope="module")
def screen() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nasty_in_one_screen", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_fits_one_screen_and_imports_torch_alone() -> None:
    lines = [line for line in FILE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 75
    assert {line.split()[1].split(".")[0] for line in lines if line.startswith(("import", "from"))} == {"torch"}


def test_losses_are_the_packages(screen: ModuleType) -> None:
    nasty, other, labels = torch.randn(9, 5), torch.randn(9, 5), torch.randint(5, (9,))
    ours = cross_entropy(nasty, labels) + 0.04 * undermining(nasty, other, 4.0)
    assert screen.nasty_loss(nasty, other, labels, 0.04, 4.0).item() == pytest.approx(ours.item(), rel=1e-6)
    ours = 0.9 * distillation(other, nasty, 4.0) + (1 - 0.9) * cross_entropy(nasty, labels)
    assert screen.student_loss(nasty, other, labels, 4.0, 0.9).item() == pytest.approx(ours.item(), rel=1e-6)


def test_nasty_training_is_the_packages_bit_for_bit(screen: ModuleType) -> None:
    images = torch.randint(0, 256, (40, 1, 12, 12), dtype=torch.uint8)
    labels = torch.arange(40) % 3
    torch.manual_seed(3)
    normal, theirs = screen.convnet(4, 3).eval(), screen.convnet(4, 3)
    ours = screen.convnet(4, 3)
    ours.load_state_dict(theirs.state_dict())

    def loss(logits, x, y):
        return screen.nasty_loss(logits, normal(x).detach(), y, 0.04, 4.0)

    screen.train(theirs, images.float() / 255, labels, loss, epochs=3, batches=8, lr=0.05, seed=7)
    recipe = Recipe(
        epochs=3, batch_size=5, lr=0.05, schedule="step", warmup=0, drops=(), clip=5.0, views=Views(crop=0)
    )  # fmt: skip
    samples = Samples(images, labels)
    data = Split(("a", "b", "c"), samples, samples)
    Nasty(omega=0.04, T=4).protect(normal, normal, lambda: ours, data, Fit(recipe, 7, torch.device("cpu")))
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_it_shows_the_effect(screen: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    screen.main(epochs=12)
    normal, nasty = capsys.readouterr().out.splitlines()

    def figures(line: str) -> list[float]:
        return [float(word.strip("%,")) for word in line.split() if "%" in word]

    assert figures(nasty)[0] > figures(normal)[0] - 3
    assert figures(nasty)[1] < figures(normal)[1] - 3


def test_plain_cross_entropy_is_torchs() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(cross_entropy(logits, labels), F.cross_entropy(logits, labels))
