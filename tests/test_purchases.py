"""The ledger of a black box: what was bought, and that it is paid once."""

import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from undistill.core.errors import StoreError, VictimError
from undistill.data import Samples
from undistill.victims.answer import Form
from undistill.victims.black_box import Outputs, Reading
from undistill.victims.endpoint import Endpoint
from undistill.victims.purchases import Purchases


def test_a_ledger_by_hand(tmp_path: Path) -> None:
    ledger = Purchases(tmp_path / "p.sqlite", 3)
    ledger.add(["a", "b"], torch.tensor([[0.0, -1.0, -2.0], [-3.0, 0.0, 0.0]]))
    ledger.add(["b"], torch.tensor([[-4.0, 0.0, 0.0]]))
    ledger.bill("lost", 5)
    again = pickle.loads(pickle.dumps(ledger))
    assert (again.billed, again.distinct, again.number("lost")) == (3, 2, 5)
    assert again.find(["a", "b", "c"])["b"].tolist() == [-4.0, 0.0, 0.0]
    assert sorted(again.find(["a", "b", "c"])) == ["a", "b"]


def test_more_keys_than_one_statement_takes(tmp_path: Path) -> None:
    ledger, keys = Purchases(tmp_path / "p.sqlite", 2), [str(number) for number in range(1234)]
    ledger.add(keys, torch.zeros(1234, 2))
    assert len(ledger.find([*keys, "no"])) == 1234


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"no database" * 100),
        lambda path: _sql(path, "UPDATE answers SET served = x'00'"),
        lambda path: _sql(path, "UPDATE answers SET served = x'0000c07f0000c07f'"),
        lambda path: _sql(path, "DROP TABLE answers; CREATE TABLE answers (other TEXT)"),
    ],
)
def test_a_damaged_ledger_is_named(spoil, tmp_path: Path) -> None:
    ledger = Purchases(tmp_path / "p.sqlite", 2)
    ledger.add(["a"], torch.zeros(1, 2))
    ledger._file._connection.close()
    spoil(ledger.path)
    with pytest.raises(StoreError, match=r"p\.sqlite .*--ledger"):
        Purchases(ledger.path, 2).find(["a"])


def _sql(path: Path, script: str) -> None:
    with sqlite3.connect(path) as database:
        database.executescript(script)


BUYER = """
import sys, torch
from pathlib import Path
from undistill.data import Samples
from undistill.victims.answer import Form
from undistill.victims.black_box import Outputs, Reading
from undistill.victims.endpoint import Endpoint
from undistill.victims.purchases import Purchases

log = open(sys.argv[2], "a")
def ask(images):
    log.write(f"{len(images)}\\n"); log.flush()
    return Outputs(torch.full((len(images), 2), 0.5))
box = Endpoint(ask, Reading("probabilities", Form.FULL, (0, 1)), Purchases(Path(sys.argv[1]), 2), identity="x",
               classes=("a", "b"), batch_size=7)
images = torch.arange(256.0).view(-1, 1, 1, 1) / 255
for start in range(0, 256, 32):
    box.answer(images[start : start + 32])
"""


def test_two_processes_never_buy_the_same_image(tmp_path: Path) -> None:
    file, log = tmp_path / "p.sqlite", tmp_path / "log"
    (tmp_path / "buyer.py").write_text(BUYER)
    command = [sys.executable, str(tmp_path / "buyer.py"), str(file), str(log)]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert sum(map(int, log.read_text().split())) == 256
    assert (Purchases(file, 2).billed, Purchases(file, 2).distinct) == (256, 256)


def endpoint(ask: Callable[[Tensor], Outputs], ledger: Purchases, workers: int = 1) -> Endpoint:
    reading = Reading("probabilities", Form.FULL, (0, 1))
    return Endpoint(ask, reading, ledger, identity="", classes=("a", "b"), batch_size=4, workers=workers)


IMAGES = torch.arange(64.0).view(-1, 1, 1, 1) / 255


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [VictimError("down"), KeyboardInterrupt()])
def test_what_was_answered_before_an_error_is_kept_and_no_more_is_asked(
    error: BaseException, workers: int, tmp_path: Path
) -> None:
    """Of sixteen requests the third fails: an error must neither hang nor go on buying."""
    asked: list[int] = []

    def ask(images: Tensor) -> Outputs:
        asked.append(len(images))
        if len(asked) == 3:
            raise error
        return Outputs(torch.full((len(images), 2), 0.5))

    ledger = Purchases(tmp_path / "p.sqlite", 2)
    box = endpoint(ask, ledger, workers)
    with pytest.raises(type(error)):
        box.answer(IMAGES)
    assert len(asked) <= 3 + workers
    assert ledger.distinct == ledger.billed == sum(asked) - 4
    box.answer(IMAGES)
    assert ledger.billed == ledger.distinct == 64
    assert sum(asked) == 64 + 4


def test_answers_that_cannot_be_read_are_billed(tmp_path: Path) -> None:
    ledger = Purchases(tmp_path / "p.sqlite", 2)
    for wrong in (torch.full((4, 2), torch.nan), torch.full((3, 2), 0.5), torch.ones(0)):
        with pytest.raises(VictimError):
            endpoint(lambda images, wrong=wrong: Outputs(wrong), ledger).answer(IMAGES[:4])  # type: ignore[misc]
    assert (ledger.billed, ledger.distinct) == (12, 0)


def test_answers_that_vary_are_kept_by_image_as_well(tmp_path: Path) -> None:
    """Test and validation images are measured at the same times; neither may get the answers of the other."""
    drawn = torch.Generator().manual_seed(0)

    def ask(images: Tensor) -> Outputs:
        p = torch.rand(len(images), 2, generator=drawn)
        return Outputs(p / p.sum(1, keepdim=True))

    reading, ledger = Reading("probabilities", Form.FULL, (0, 1)), Purchases(tmp_path / "p.sqlite", 2)
    box = Endpoint(ask, reading, ledger, identity="", classes=("a", "b"), repeatable=False)
    pixels = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1)
    test, validation = (Samples(part, torch.zeros(10, dtype=torch.int64)) for part in pixels.split(10))
    measured, others = box.asked(test, 2), box.asked(validation, 2)
    assert len(measured) == 5
    assert not any(torch.equal(one, other) for one, other in zip(measured, others, strict=True))
    assert all(map(torch.equal, measured, box.asked(test, 2)))
