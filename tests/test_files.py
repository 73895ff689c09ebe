"""Images that stay in their files: the same bits as in memory, read ahead by any number of workers."""

import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import RECIPE, STUDENT, toy_arrays
from undistill.core.errors import DataError
from undistill.data import Data, Source
from undistill.data.batches import Batch, ViewDataset
from undistill.data.files import ImageFiles
from undistill.data.views import Views
from undistill.models import Model
from undistill.training.answers import AnswerStore, RememberedAnswers
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.metrics import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    toy = toy_arrays(per_class=20)
    for number, (image, label) in enumerate(zip(toy["images"], toy["labels"], strict=True)):
        (folder / f"class{label}").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"class{label}" / f"{number:03d}.png")
    return folder


def load(folder: Path, stream: bool) -> Data:
    return Source.parse(f"Folder(path={str(folder)!r}, stream={stream})").load()


@pytest.fixture(scope="module")
def memory(folder: Path) -> Data:
    return load(folder, stream=False)


@pytest.fixture(scope="module")
def files(folder: Path) -> Data:
    return load(folder, stream=True)


def test_the_same_images_in_the_same_parts(memory: Data, files: Data) -> None:
    assert isinstance(files.train.images, ImageFiles)
    assert isinstance(memory.train.images, Tensor)
    for ours, theirs in ((files.train, memory.train), (files.validation, memory.validation), (files.test, memory.test)):
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_views_are_the_same_bits_with_every_number_of_workers(
    workers: int, memory: Data, files: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(workers)))
    views = Views(flip=True, rotate=10, cutmix=1)
    order = torch.randperm(len(memory.train), generator=torch.Generator().manual_seed(1)).split(7)
    read = list(ViewDataset(files.train, views, 5, 3).shows(2, order))
    for index, (images, labels) in zip(order, read, strict=True):
        expected = ViewDataset(memory.train, views, 5, 3).show(2, index)
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


def test_training_answers_and_evaluation_are_the_same_bits(memory: Data, files: Data) -> None:
    victim = RememberedAnswers(Model.parse(STUDENT).build(memory.shape, 3, 2))

    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), victim(batch).softmax(1))}

    logits = []
    for data in (memory, files):
        fit = Fit(RECIPE.model_copy(update={"epochs": 2}), 0, torch.device("cpu"))
        trained = fit(Model.parse(STUDENT).build(data.shape, 3, 1), data.split, objective)
        logits.append(evaluate(trained, data.test))
    assert torch.equal(*logits)


def test_streaming_and_remembering_leave_the_dropout_alone(memory: Data, files: Data, tmp_path: Path) -> None:
    """Threads read ahead or not, according to what is remembered; a student must not notice."""
    network = Model.parse(STUDENT).build(memory.shape, 3, 2)

    def student(data: Data, store: AnswerStore) -> Tensor:
        victim = RememberedAnswers(deepcopy(network), store=store)

        def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"ce": cross_entropy(network(batch.images), victim(batch).softmax(1))}

        fit = Fit(RECIPE.model_copy(update={"epochs": 2}), 0, torch.device("cpu"))
        dropping = nn.Sequential(nn.Dropout(0.3), Model.parse(STUDENT).build(data.shape, 3, 1))
        return evaluate(fit(dropping, data.split, objective), data.test)

    expected = student(memory, AnswerStore(limit=0))
    for data, store in ((files, AnswerStore(limit=0)), (files, AnswerStore(tmp_path)), (files, AnswerStore(tmp_path))):
        assert torch.equal(student(data, store), expected)


def test_an_image_that_breaks_or_vanishes_during_training_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = load(copy, stream=True)
    assert isinstance(data.train.images, ImageFiles)
    broken = data.train.images.files[3]
    broken.write_bytes(broken.read_bytes()[:60])

    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), batch.labels)}

    for said in (f"{broken.name} is not a readable image", f"{broken.name} cannot be read: No such file"):
        with pytest.raises(DataError, match=said):
            Fit(RECIPE, 0, torch.device("cpu"))(Model.parse(STUDENT).build(data.shape, 3, 1), data.split, objective)
        broken.unlink(missing_ok=True)


def test_a_changed_image_is_other_data(folder: Path, files: Data, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert load(copy, stream=True).digest == files.digest
    image = next(copy.glob("class0/*.png"))
    Image.open(image).rotate(90).save(image)
    assert load(copy, stream=True).digest != files.digest
