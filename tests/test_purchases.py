"""The ledger of a black box: what was bought, and that it is paid once."""

import os
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from undistill.core.errors import StoreError, VictimError
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
    ledger._database.close()
    spoil(ledger.path)
    with pytest.raises(StoreError, match=r"p\.sqlite .*--ledger"):
        Purchases(ledger.path, 2).find(["a"])


def _sql(path: Path, script: str) -> None:
    with sqlite3.connect(path) as database:
        database.executescript(script)


BUYER = """
import sys, torch
from pathlib import Path
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


def test_what_was_answered_before_an_error_is_kept(tmp_path: Path) -> None:
    asked = []

    def ask(images: Tensor) -> Outputs:
        asked.append(len(images))
        if len(asked) == 3:
            raise VictimError("down")
        return Outputs(torch.full((len(images), 2), 0.5))

    ledger = Purchases(tmp_path / "p.sqlite", 2)
    box = Endpoint(
        ask, Reading("probabilities", Form.FULL, (0, 1)), ledger, identity="", classes=("a", "b"), batch_size=4
    )
    images = torch.arange(16.0).view(-1, 1, 1, 1) / 255
    with pytest.raises(VictimError, match="down"):
        box.answer(images)
    assert ledger.distinct >= 8
    bought = ledger.distinct
    box.answer(images)
    assert ledger.billed == ledger.distinct == 16
    assert sum(asked[4:]) == 16 - bought or sum(asked) == 16 + 4
