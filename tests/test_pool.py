"""Pools of other images: taken in the model's shape, never with images on which thieves are measured."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import RECIPE, STUDENT, students, toy_arrays
from tests.test_cli import call, refused
from tests.test_victims import jobs
from undistill.api import audit
from undistill.attacks import Attack
from undistill.attacks.surrogate.active_thief import centres, nearest
from undistill.core.errors import DataError, SpecError, remark
from undistill.data import Data
from undistill.data.pool import read_pool
from undistill.data.split import Samples
from undistill.runs.run import Run
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy, evaluate
from undistill.victims.answer import Answer
from undistill.victims.oracle import Access, Oracle


def write(path: Path, images: np.ndarray) -> str:
    np.savez(path, images=images, labels=np.arange(len(images)) % 3)
    return str(path)


def test_a_pool_has_all_images_of_its_source_and_no_labels(pool: str, toy: Data) -> None:
    found = read_pool(pool, toy)
    assert len(found) == 90
    assert (found.labels < 0).all()


def test_a_pool_with_test_images_is_refused(toy: Data, tmp_path: Path) -> None:
    images = np.concatenate([toy_arrays(per_class=10, seed=7)["images"], toy.test.pixels[:5, 0].numpy()])
    with pytest.raises(DataError, match=r"5 images of the pool .* are also test images.*other images"):
        read_pool(write(tmp_path / "x.npz", images), toy)


def test_a_pool_with_training_images_is_said(toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remark.cache_clear()
    images = np.concatenate([toy_arrays(per_class=10, seed=7)["images"], toy.train.pixels[:4, 0].numpy()])
    read_pool(write(tmp_path / "x.npz", images), toy)
    assert "4 images of the pool are also training images of the model" in caplog.text


def test_a_pool_that_nobody_asks_about_is_refused(victim: Run, pool: str, tmp_path: Path) -> None:
    words = ["audit", victim.folder, "--student", STUDENT, "--pool", pool, "--out", tmp_path / "a"]
    refused(call(*words), "No attack here asks about a pool; name one, such as --attack 'Knockoff()'")


def test_an_active_thief_asks_where_somebody_is_unsure() -> None:
    """By entropy where his student is, by bucket near what the victim was least sure of."""
    pool = Samples(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), torch.full((6,), -1))
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.9, 0.1], [0.45, 0.55], [0.1, 0.9]])

    class Known(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return p.clamp_min(1e-9).log()[(images.flatten() * 255).round().long()]

    bought = Answer.of_logits(torch.tensor([[9.0, 0.0], [0.2, 0.0]]))  # sure of the first, not of the second
    for strategy, expected in (("entropy", {2, 4}), ("bucket", {4, 5})):
        thief, generator = Attack.parse(f"ActiveThief(strategy='{strategy}')"), torch.Generator().manual_seed(0)
        chosen = thief._choose(2, Known().eval(), pool, torch.tensor([0, 1]), bought, generator)
        assert set(chosen.tolist()) == expected


def test_another_shape_is_changed_and_said(toy: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remark.cache_clear()
    images = np.full((30, 24, 24, 3), 90, np.uint8)
    images[:, :12] = 30
    images[np.arange(30), 0, np.arange(30) % 24] = np.arange(30)[:, None]  # no two alike
    found = read_pool(write(tmp_path / "x.npz", images), toy)
    assert found.images.shape == (30, 1, 12, 12)
    assert found.pixels[0, 0, 2, 6] == 30
    assert found.pixels[0, 0, -1, 6] == 90
    assert "3 x 24 x 24 (channels, height, width); they are changed to 1 x 12 x 12" in caplog.text


def test_files_of_another_shape_are_refused(toy: Data, tmp_path: Path) -> None:
    for number in range(24):
        folder = tmp_path / "photos" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (24, 24), number * 10).save(folder / f"{number}.png")
    with pytest.raises(DataError, match=r"1 x 24 x 24 .* the model's 1 x 12 x 12.*size=12"):
        read_pool(f"Folder(path='{tmp_path / 'photos'}', stream=True)", toy)


def test_bad_pools_are_said_before_anything_is_trained(victim: Run, pool: str, tmp_path: Path) -> None:
    def start(**others: object) -> None:
        audit(victim, tmp_path / "a", students=[STUDENT], attacks=["Knockoff()"], recipe=RECIPE, device="cpu", **others)

    with pytest.raises(SpecError, match=r"Knockoff.* needs other images than the owner's; name some: --pool DATA"):
        start()
    with pytest.raises(SpecError, match=r"The pool has 90 images, and the budget is 91; lower --budget"):
        start(pool=pool, budget=91)
    with pytest.raises(SpecError, match="at least one query"):
        start(pool=pool, budget=0)
    assert not (tmp_path / "a").exists()


def test_cells_of_two_pools_are_two(victim: Run, pool: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.npz", toy_arrays(per_class=30, seed=8)["images"])
    keys = [job.key for where in (pool, other) for job in jobs(victim, "Knockoff()", where)]
    assert len(set(keys)) == 4
    assert [job.key for job in jobs(victim, "SoftLabels()", pool)] == [job.key for job in jobs(victim, "SoftLabels()")]


@pytest.mark.parametrize("strategy", ["random", "entropy", "k-centre", "bucket"])
def test_an_active_thief_spends_what_he_may_and_asks_nothing_twice(strategy: str, victim: Run, pool: str) -> None:
    (job, _) = jobs(victim, f"ActiveThief(strategy='{strategy}', rounds=4, first=0.2)", pool)
    oracle = Oracle(victim.network(), Access.QUERY, budget=50)
    fit = Fit(RECIPE.model_copy(update={"epochs": 2}), 0, job.pair.options.device)
    job.attack.run(oracle, students(job.pair.data), job.data, fit)
    assert oracle.ledger.billed == 50
    assert oracle.ledger.distinct == 50
    assert fit.calls == 4


def test_centres_are_far_from_what_is_known_and_from_one_another() -> None:
    points = torch.tensor([[0.0, 0.0], [5.0, 0.0], [5.1, 0.0], [0.0, 4.0], [0.1, 0.0]])
    assert centres(points, torch.zeros(1, 2), 2).tolist() == [2, 3]
    assert nearest(points, torch.tensor([[0.0, 0.0], [5.0, 5.0]])).tolist() == [0, 0, 1, 0, 0]


def test_a_thief_learns_from_other_images(victim: Run, honest: Run, pool: str, toy: Data) -> None:
    (job, _) = jobs(victim, "Knockoff()", pool)
    fit = Fit(RECIPE.model_copy(update={"epochs": 20}), 0, job.pair.options.device)
    student = Attack.parse("Knockoff()").run(Oracle(honest.network(), Access.QUERY), students(toy), job.data, fit)
    assert accuracy(evaluate(student, toy.test), toy.test.labels) > 0.6


def test_without_a_pool_the_current_folder_is_none(victim: Run, tmp_path: Path) -> None:
    words = ["audit", victim.folder, "--student", STUDENT, "--attack", "Knockoff()", "--out", tmp_path / "a"]
    refused(call(*words), "name some: --pool DATA")
