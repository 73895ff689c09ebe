"""A toy world: three classes of 12 x 12 images and networks that train in well under a second."""

import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from undistill.api import audit
from undistill.auditing.schema import Report
from undistill.auditing.students import Students
from undistill.data import Data, Npz
from undistill.data.official import VARIABLE
from undistill.models import Model
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings, TrainSettings
from undistill.runs.train import train
from undistill.training.fit import Fit
from undistill.training.recipe import Recipe

pytest_plugins = "pytester"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cpu (default) hides a GPU from all tests and their processes; cuda shows it.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anybody looks
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no GPU here.")


torch.set_num_threads(1)

TEACHER = "ConvNet(width=4)"
STUDENT = "ConvNet(width=2)"
RECIPE = Recipe(epochs=6, batch_size=16, lr=0.1)
FAST = "recipe.epochs=6", "recipe.batch_size=16", "recipe.lr=0.1"
NASTY = "Nasty(omega=0.05, T=4)"


def toy_arrays(per_class: int = 40, classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Noisy stripes, in one direction per class."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    angle, phase = labels * np.pi / classes, random.uniform(0, 2 * np.pi, len(labels))
    y, x = np.mgrid[:12, :12]
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    images = 128 + 80 * np.sin(2 * along + phase[:, None, None]) + random.normal(0, 30, (len(labels), 12, 12))
    return {"images": images.clip(0, 255).astype(np.uint8), "labels": labels}


def students(data: Data, model: str = STUDENT, seed: int = 0) -> Students:
    """New students for images like those of `data`."""
    return Students(Model.parse(model), data.shape, data.num_classes, seed)


class These:
    """Students that were made already, for an attack that takes no more of them."""

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = networks

    def __call__(self, number: int = 0) -> nn.Module:
        return self.networks[number]

    def stages(self, network: nn.Module) -> Sequence[nn.Module]:
        return list(network.children())


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.npz"
    np.savez(path, **toy_arrays())
    return path


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ninety images of the toy world that nobody else has, as the text of a source."""
    path = tmp_path_factory.mktemp("pool") / "pool.npz"
    np.savez(path, **toy_arrays(per_class=30, seed=7))
    return str(path)


@pytest.fixture(scope="session")
def toy(toy_file: Path) -> Data:
    return Npz(path=str(toy_file)).load()


@pytest.fixture(scope="session")
def honest(toy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "honest"
    return train(str(toy_file), TEACHER, out, settings=TrainSettings(recipe=RECIPE), device="cpu")


@pytest.fixture(scope="session")
def victim(honest: Run) -> Run:
    out = honest.folder.with_name("victim")
    return protect(honest, NASTY, out, settings=Settings(recipe=RECIPE), device="cpu")


@pytest.fixture(scope="session")
def audited(victim: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """The audit of the nasty toy teacher with two seeds, and its folder."""
    folder = tmp_path_factory.mktemp("audits") / "audit"
    return audit(victim, folder, students=[STUDENT], seeds=2, device="cpu"), folder


@pytest.fixture(scope="session")
def report(audited: tuple[Report, Path]) -> Report:
    return audited[0]


@pytest.fixture(scope="session")
def folder(audited: tuple[Report, Path]) -> Path:
    return audited[1]


@pytest.fixture
def fit() -> Fit:
    return Fit(RECIPE, 0, torch.device("cpu"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for public data."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    return _unskipped(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    return _unskipped(report)


def _unskipped(report: Any) -> Any:
    """Under `CI=true` a skipped test is a failed one unless it needs a GPU: what is skipped there is tested nowhere."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "needs a GPU" not in reason:
            report.outcome, report.longrepr = "failed", f"skipped under CI=true ({reason})"
    return report


@pytest.fixture(scope="session")
def alone(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """An audit of the honest network without a twin, with one student of each kind."""
    out = tmp_path_factory.mktemp("alone")
    return audit(honest, out, honest="none", students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")


@pytest.fixture
def boxes() -> None:
    """Operators of torchvision, which timm imports: its wheels are for CUDA, and fail beside a torch for CPUs."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        KEPT.append(library)
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


KEPT: list[torch.library.Library] = []  # what it defines goes with it
