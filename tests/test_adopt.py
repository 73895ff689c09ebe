"""A classifier that was trained elsewhere, with its own normalisation, order of classes and kind of answers."""

import functools
import importlib
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from tests.conftest import STUDENT
from undistill import Run, adopt, audit, protect
from undistill.cli import app
from undistill.core.errors import DataError, ModelError, SpecError, StoreError, remark
from undistill.data import Source
from undistill.data.apart import Apart
from undistill.models import Model
from undistill.models.adapter import Adapter
from undistill.models.weights import read_state
from undistill.runs.settings import Settings
from undistill.training.metrics import accuracy, evaluate
from undistill.training.recipe import Recipe

COLOURS = {"cat": (40, 200, 40), "dog": (200, 40, 40), "eel": (40, 40, 200), "fox": (180, 180, 40)}
THEIRS = ("dog", "cat", "fox", "eel")
"""The classes in the order of the network's outputs."""
MEAN, STD = (torch.tensor(values).view(-1, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
NET = """
import torch
from pathlib import Path
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_classes))

def soft(num_classes):
    return nn.Sequential(*make(num_classes), nn.Softmax(1))

def loaded(num_classes):
    network = make(num_classes)
    network.load_state_dict(torch.load(Path(__file__).with_name("plain.pt"), weights_only=True))
    return network
"""


def photos(folder: Path, count: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.array(colour) + random.normal(0, 60, (12, 12, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.py, photos, other photos, and weights that were trained outside of this project."""
    root = tmp_path_factory.mktemp("adopt")
    (root / "net.py").write_text(NET)
    photos(root / "other", 20, 1)
    data = Source.parse(str(photos(root / "photos", 40, 0))).load()
    names: dict[str, object] = {"__file__": str(root / "net.py")}
    exec(NET, names)
    torch.manual_seed(0)
    network: nn.Module = names["make"](4)  # type: ignore[operator]
    images = (data.train.pixels / 255 - MEAN) / STD
    labels = torch.tensor([THEIRS.index(name) for name in data.classes])[data.train.labels]
    optimiser = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(80):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()
    torch.save(network.state_dict(), root / "plain.pt")
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 80}, root / "best.pth.tar")
    return root


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    remark.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def taken(world: Path, out: Path, factory: str = "make", **options: object) -> Run:
    options = {"weights": world / "best.pth.tar", "device": "cpu"} | options
    return adopt(f"{world / 'net.py'}:{factory}", str(world / "photos"), out, **options)  # type: ignore[arg-type]


RIGHT = {"preprocess": "imagenet", "classes": THEIRS}


def test_a_network_with_its_normalisation_and_order(world: Path, tmp_path: Path) -> None:
    run = taken(world, tmp_path / "run", **RIGHT)
    assert run.record["metrics"]["test_accuracy"] > 0.9
    assert run.record["metrics"]["train_accuracy"] > 0.9
    network, data = run.network(Model.from_user(f"{world / 'net.py'}:make")), run.data()
    assert accuracy(evaluate(network, data.test), data.test.labels) == run.record["metrics"]["test_accuracy"]
    kept, given = read_state(tmp_path / "run" / "weights.safetensors"), read_state(world / "plain.pt")
    assert kept.keys() == given.keys()
    assert all(torch.equal(kept[name], given[name]) for name in given)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_what_is_lacking_is_named(world: Path, tmp_path: Path, said: pytest.LogCaptureFixture, device: str) -> None:
    taken(world, tmp_path / "run", device=device)
    assert "Accuracy is near chance" in said.text
    assert "With --preprocess imagenet --classes dog,cat,fox,eel it is" in said.text


def test_what_was_named_wrongly_is_put_right(world: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    taken(world, tmp_path / "order", preprocess="imagenet", classes=("eel", "fox", "cat", "dog"))
    assert "With --classes dog,cat,fox,eel it is" in said.text
    mine = Adapter(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    said.clear()
    remark.cache_clear()
    taken(world, tmp_path / "own", preprocess=mine, classes=("fox", "eel", "dog", "cat"))
    assert "With --classes dog,cat,fox,eel it is" in said.text


def test_other_weights_are_another_run(world: Path, tmp_path: Path) -> None:
    plain = read_state(world / "plain.pt")
    other = {name: value + 1 for name, value in plain.items()}
    torch.save({"model": plain, "ema": other}, tmp_path / "both.pt")
    taken(world, tmp_path / "run", weights=tmp_path / "both.pt")
    with pytest.raises(StoreError, match=r"holds another run .start_sha256"):
        taken(world, tmp_path / "run", weights=tmp_path / "both.pt", key="model")


def test_unseen_images_are_those_that_are_nowhere_else(
    world: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=r"are also in .*, so that none of them is unseen"):
        taken(world, tmp_path / "a", test=str(world / "photos"))
    mixed = photos(tmp_path / "mixed", 10, 7)
    for name in COLOURS:
        shutil.copy(world / "photos" / name / "3.png", mixed / name / "known.png")
    shutil.rmtree(mixed / "eel")
    run = taken(world, tmp_path / "a", test=str(mixed))
    assert "3 test images are also in" in said.text
    assert "No test image of eel" in said.text
    data = run.data()
    assert (len(data.test), sorted(set(data.test.labels.tolist()))) == (30, [0, 1, 3])
    assert len(data.train) + len(data.validation) == 160


def test_unseen_images_are_recognised_in_files_too(world: Path, tmp_path: Path) -> None:
    mixed = photos(tmp_path / "mixed", 10, 7)
    for name in COLOURS:
        shutil.copy(world / "photos" / name / "3.png", mixed / name / "known.png")
    streamed = f"Folder(path='{world / 'photos'}', stream=True)"
    assert len(Apart(of=streamed, test_on=str(mixed)).load().test) == 40


def test_labels_beyond_the_classes_are_refused(world: Path, tmp_path: Path) -> None:
    images = np.zeros((40, 12, 12, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(40)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(40) % 4 - 1, classes=np.array(sorted(COLOURS)))
    with pytest.raises(DataError, match="Labels run from -1 to 2"):
        Apart(of=str(world / "photos"), test_on=str(tmp_path / "test.npz")).load()


def test_the_data_are_divided_as_they_say(world: Path, tmp_path: Path) -> None:
    source = f"Folder(path='{world / 'photos'}', count=40, validation=0.5, seed=3)"
    run = adopt(f"{world / 'net.py'}:loaded", source, tmp_path / "run", test=str(world / "other"), device="cpu")
    assert [len(part) for part in (run.data().train, run.data().validation, run.data().test)] == [20, 20, 80]
    with pytest.raises(DataError, match=r"leave out test=0\.5"):
        adopt(f"{world / 'net.py'}:loaded", source[:-1] + ", test=0.5)", tmp_path / "b", test=str(world / "other"))


@pytest.mark.parametrize("order", [(0, 0, 1), (9, 9, 9), (1, 2)])
def test_an_order_names_every_output_once(order: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="order must name every output once"):
        Adapter(order=order)
    with pytest.raises(ModelError, match="order names 2 outputs of a network with 3"):
        Adapter(order=(1, 0)).wrap(nn.Identity(), 3, 3)


def test_probabilities_are_read_as_such(world: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    runs = [taken(world, tmp_path / name, name, **RIGHT) for name in ("make", "soft")]
    assert "soft answers probabilities" in said.text
    names = [f"{world / 'net.py'}:{name}" for name in ("make", "soft")]
    data = runs[0].data()
    logits, logs = (
        evaluate(run.network(Model.from_user(name)), data.test) for run, name in zip(runs, names, strict=True)
    )
    assert torch.allclose(logits.log_softmax(1), logs, atol=1e-4)
    assert runs[0].record["metrics"]["validation_nll"] == pytest.approx(runs[1].record["metrics"]["validation_nll"])


@pytest.mark.parametrize("test", [False, True], ids=["unknown", "named"])
def test_the_report_says_whether_test_images_may_be_memory(test: bool, world: Path, tmp_path: Path) -> None:
    model = f"{world / 'net.py'}:loaded"
    chosen = {"test": str(world / "other")} if test else {}
    honest = taken(world, tmp_path / "run", "loaded", weights=None, **RIGHT, **chosen)
    victim = protect(
        honest,
        "Rounding(digits=1)",
        tmp_path / "victim",
        model=model,
        settings=Settings(recipe=Recipe(epochs=1)),
        device="cpu",
    )
    report = audit(
        victim, tmp_path / "audit", model=model, students=[STUDENT], seeds=1, recipe=Recipe(epochs=1), device="cpu"
    )
    page = (tmp_path / "audit" / "report.html").read_text()
    assert ("adopted_weights" in {flag.name for flag in report.flags}) != test
    assert ("kept apart from training" in page) == test
    assert ("on which the model may have been trained" in page) != test
    assert report.pairs[0].test_images == (80 if test else 32)


def test_bad_words_are_explained(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"No preprocessing named 'imagnet'; did you mean 'imagenet'"):
        taken(world, tmp_path / "a", preprocess="imagnet")
    with pytest.raises(SpecError, match="must name all 4 classes of the data once; see bird, dog"):
        taken(world, tmp_path / "a", classes=("bird", "cat", "eel", "fox"))
    with pytest.raises(ModelError, match="no pretrained_cfg of timm"):
        taken(world, tmp_path / "a", preprocess="timm")
    with monkeypatch.context() as patched:
        patched.setattr(Source, "load", lambda _: pytest.fail("images were read first"))
        with pytest.raises(ModelError, match="There is no weights file"):
            taken(world, tmp_path / "a", weights="nowhere.pt")
    photos(tmp_path / "three", 9, 3)
    (tmp_path / "three" / "fox").rename(tmp_path / "three" / "wolf")
    with pytest.raises(DataError, match=r"wolf \.\.\.; test images must be of the same classes|called the same"):
        taken(world, tmp_path / "a", test=str(tmp_path / "three"))
    assert not (tmp_path / "a").exists()


def test_a_function_may_be_given_itself(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(world))
    net = importlib.import_module("net")
    run = adopt(
        net.make, str(world / "photos"), tmp_path / "run", weights=world / "best.pth.tar", device="cpu", **RIGHT
    )
    assert run.record["model"] == f"{world / 'net.py'}:make"
    for unknown in (lambda: net.make(4), functools.partial(net.make, 4)):
        with pytest.raises(ModelError, match="cannot be found again by a later process"):
            adopt(unknown, str(world / "photos"), tmp_path / "other")


def test_the_command(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    words = ["adopt", "best.pth.tar", "--model", "net.py:make", "--data", "photos", "--out", str(tmp_path / "run")]
    how = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "--classes", "dog, cat, fox, eel"]
    done = CliRunner().invoke(app, [*words, *how, "--test", "other", "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    assert "on test images, that it has not seen" in done.stdout
    assert CliRunner().invoke(app, [*words, *how, "--test", "other", "--device", "cpu"]).exit_code == 0, "instant"
    done = CliRunner().invoke(app, [*words, "--mean", "a,b"])
    assert (done.exit_code, "'a,b' is no list of numbers" in done.stderr) == (2, True)
