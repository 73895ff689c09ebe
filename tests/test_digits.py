"""Thieves that learn too little of stripes, on handwritten digits."""

from statistics import fmean

import pytest
import torch

from tests.conftest import students
from undistill import train
from undistill.attacks import Attack
from undistill.core.seeds import seeded
from undistill.data import Split
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy, evaluate
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Oracle


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("digits") / "honest"
    return train("Digits()", "ConvNet(width=8)", out, settings=TrainSettings(recipe=Recipe(epochs=12)), device="cpu")


def stolen(digits: Run, text: str, split: Split, epochs: int, seed: int = 0) -> tuple[float, Oracle]:
    """Accuracy of a student, and the oracle that it asked."""
    attack, data = Attack.parse(text), digits.data()
    oracle, fit = Oracle(digits.network(), attack.needs), Fit(Recipe(epochs=epochs), seed, torch.device("cpu"))
    with seeded(seed):
        student = attack.run(oracle, students(data, "ConvNet(width=8)", seed=seed), split, fit)
    return accuracy(evaluate(student, data.test), data.test.labels), oracle


def test_images_without_labels_help_a_thief_with_few(digits: Run) -> None:
    few = digits.data().attackers(0.1, 0).unlabelled.some(40, 1)
    assert few.spare is not None
    with_guesses, oracle = stolen(digits, "FixMatch(mu=1)", few, 20)
    assert oracle.ledger.billed == 40
    assert with_guesses > stolen(digits, "FixMatch(mu=1, weight=0)", few, 20)[0]


def test_a_thief_with_neither_data_nor_weights_learns_something(digits: Run) -> None:
    """In the mean of two seeds, which are far apart."""
    split = digits.data().attackers(0.1, 0)
    found, oracles = zip(*(stolen(digits, "DisGUIDE(width=16)", split, 40, seed) for seed in (0, 1)), strict=True)
    assert fmean(found) > 0.2, "chance is 0.1"
    assert all(oracle.ledger.billed == oracle.ledger.distinct > 1000 for oracle in oracles)
