"""Networks and images that are given as Python objects, not by name."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.conftest import RECIPE, STUDENT, toy_arrays
from undistill import Run, adopt, audit, protect, train
from undistill.core.code import reference
from undistill.core.errors import DataError, ModelError, StoreError
from undistill.data.arrays import stored
from undistill.models import Given, given
from undistill.models.weights import load_weights, weights_sha256
from undistill.runs.settings import Settings, TrainSettings

ARRAYS = toy_arrays(per_class=20)
IMAGES, LABELS = ARRAYS["images"], ARRAYS["labels"]


class Scaled(nn.Module):
    """A parameter of its own, beside layers that know how to begin."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.gamma = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.full((4,), 2.0))
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        seen: Tensor = self.first(images).relu().mean((2, 3)) * self.gamma + self.token[:, 0]
        return self.last(seen)  # type: ignore[no-any-return]


class Items(Dataset[Any]):
    """Images as people's data sets give them."""

    classes = ("flat", "slanted", "steep")

    def __init__(self, make: Any, count: int = len(LABELS)) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.make(IMAGES[number]), int(LABELS[number])


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def test_a_network_and_a_dataset_go_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = network()
    before = weights_sha256(own)
    run = adopt(own, Items(lambda image: torch.from_numpy(image)[None] / 255), tmp_path / "mine", device="cpu")
    again = network()
    load_weights(again, run.folder / "weights.safetensors")
    assert weights_sha256(again) == before
    assert (run.record["classes"], run.has_history) == (["flat", "slanted", "steep"], True)
    victim = protect(
        run, "Nasty(omega=0.01)", tmp_path / "nasty", model=own, settings=Settings(recipe=RECIPE), device="cpu"
    )
    report = audit(victim, tmp_path / "audit", model=own, students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")
    assert report.pairs[0].adopted_weights
    assert weights_sha256(own) == before

    monkeypatch.setattr(given, "_given", {})  # as in another process
    with pytest.raises(ModelError, match=r"Sequential was given as an object.*Give it again"):
        Run.open(victim.folder).network()
    assert Run.open(victim.folder).network(Given.of(network())) is not None
    with pytest.raises(StoreError, match="is another network than Sequential"):
        Run.open(victim.folder).network(Given.of(network(width=5)))


def test_a_network_begins_to_train_as_it_is(tmp_path: Path) -> None:
    own = network()
    settings = TrainSettings(recipe=RECIPE.model_copy(update={"epochs": 0}))
    run = train((IMAGES, LABELS), own, tmp_path / "mine", settings=settings, device="cpu")
    assert torch.equal(run.network()[0].weight, own[0].weight)  # type: ignore[index, union-attr]
    assert run.has_history


def test_new_networks_of_its_kind_differ_by_seed_alone() -> None:
    trained = Scaled()
    spec = Given.of(trained)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(1)
    assert Given.of(trained) == spec, "what it learns changes nothing"
    first, same, other = (spec.build((1, 12, 12), 3, seed) for seed in (1, 1, 2))
    assert weights_sha256(first) == weights_sha256(same) != weights_sha256(other)
    assert torch.equal(first.gamma, torch.ones(4))  # type: ignore[arg-type]
    assert 0 < first.token.std() < 0.1  # type: ignore[operator, union-attr]


def test_what_is_outside_of_the_weights_makes_another_network() -> None:
    one, other = Scaled(), Scaled()
    other.shift = 3.0
    assert Given.of(one) != Given.of(other)
    assert Given.of(other).build((1, 12, 12), 3, 0).shift == 3.0
    functions = [Scaled(), Scaled()]
    functions[0].act, functions[1].act = torch.relu, torch.tanh
    assert Given.of(functions[0]) != Given.of(functions[1])
    other.register_buffer("fixed", torch.ones(2), persistent=False)
    more = Given.of(other)
    other.fixed += 1  # type: ignore[operator]
    assert Given.of(other) != more


def test_what_weights_and_use_change_makes_no_other_network(tmp_path: Path) -> None:
    normed = torch.nn.utils.spectral_norm(nn.Linear(144, 3))
    own = nn.Sequential(nn.Flatten(), normed)
    run = adopt(own, (IMAGES, LABELS), tmp_path / "run", device="cpu")
    assert run.network(Given.of(own)) is not None
    cached = Scaled()
    before = Given.of(cached)
    cached.seen = cached(torch.rand(2, 1, 12, 12)).detach()
    assert Given.of(cached) == before


KINDS = """
import torch
from torch import nn
from undistill.models import Given

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mode, self.last = "a", nn.Linear(4, 3)
    def forward(self, x):
        return self.last(x) if self.mode in {"a", "b", "cc", "ddd"} else x

print(Given.of(Net()))
"""


def test_a_network_of_a_script_is_known_again_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(KINDS)
    said = {
        subprocess.run(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda image: image,
        lambda image: torch.from_numpy(image),
        lambda image: torch.from_numpy(image)[None] / 255,
        lambda image: Image.fromarray(image),
        lambda image: image[..., None] / np.float64(255),
    ],
    ids=["array", "tensor", "ToTensor", "PIL", "float64 HWC"],
)
def test_images_of_every_kind_arrive_as_they_are(make: Any, tmp_path: Path) -> None:
    data = stored(Items(make), tmp_path / "run").read()
    assert np.array_equal(data.train.pixels[:, 0].numpy(), IMAGES)
    assert np.array_equal(data.train.labels.numpy(), LABELS)


def test_the_same_images_are_kept_once(tmp_path: Path) -> None:
    arrays = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:30], "y_test": LABELS[:30]}
    assert stored(arrays, tmp_path / "run") == stored(arrays, tmp_path / "run")
    assert stored((IMAGES, LABELS), tmp_path / "run") != stored((255 - IMAGES, LABELS), tmp_path / "run")
    assert len(list(tmp_path.glob("run-data-*.npz"))) == 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((IMAGES / 255 - 0.5, LABELS), r"images runs from -0\..*leave that out, and name it: preprocess="),
        ((np.full((60, 12, 12), np.nan), LABELS), "images runs from nan"),
        ((IMAGES.astype(str), LABELS), "images is of type <U3"),
        ({"pictures": IMAGES, "labels": LABELS}, "The arrays are called pictures; they must be images, labels"),
        (Items(lambda image: image + np.random.default_rng().integers(0, 9)), "differently each time"),
        (Items(lambda image: image[: 6 + image[0, 0] % 2]), "gives images of the shapes"),
        ([], "it is empty"),
        (iter([]), "cannot be read as a Dataset of .image, label. with a length"),
        (Items(lambda _: None), "images is of type object"),
        ([(IMAGES[0], [0, 1])], "Labels are whole numbers"),
        ([(IMAGES[0], 0, "name")], "cannot be read as a Dataset of .image, label."),
    ],
    ids=["normalised", "NaN", "text", "names", "random", "sizes", "empty", "iterator", "None", "one-hot", "triple"],
)
def test_what_cannot_be_used_is_said(data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        stored(data, tmp_path / "run")
    assert not list(tmp_path.iterdir())


SCRIPT = """
import numpy as np, undistill
from torch import nn

print("runs")

def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes))

labels = np.repeat(np.arange(3), 20)
images = np.random.default_rng(0).integers(0, 256, (60, 12, 12), dtype=np.uint8)
run = undistill.adopt(make, (images, labels), "run", device="cpu")
print(run.record["model"].rpartition(":")[2])
"""


def test_a_script_that_gives_its_own_function_runs_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["runs", "make"]


def test_a_function_of_a_package_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text("")
    (tmp_path / "zoo" / "parts.py").write_text("from torch import nn\n")
    (tmp_path / "zoo" / "nets.py").write_text("from .parts import nn\n\ndef make():\n    return nn.Flatten()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reference(importlib.import_module("zoo.nets").make) == "zoo.nets:make"
