import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import RECIPE, TEACHER, toy_arrays
from undistill.core.errors import StoreError
from undistill.models import Model
from undistill.runs.folder import claim
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.runs.train import train

SETTINGS = TrainSettings(recipe=RECIPE)


def copy(run: Run, to: Path) -> Path:
    to.mkdir()
    for file in filter(Path.is_file, run.folder.iterdir()):
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_run_is_whole(honest: Run) -> None:
    names = {path.name for path in honest.folder.iterdir()} - {"answers"}  # which other commands keep there
    assert names == {"request.json", "run.json", "weights.safetensors", "metrics.jsonl", ".lock"}
    record = json.loads((honest.folder / "run.json").read_text())
    assert record["model"] == TEACHER
    assert record["environment"]["torch"] == torch.__version__
    assert len((honest.folder / "metrics.jsonl").read_text().splitlines()) == RECIPE.epochs


def test_a_repeated_run_is_instant_and_untouched(honest: Run, toy_file: Path) -> None:
    before = (honest.folder / "run.json").stat().st_mtime_ns
    again = train(str(toy_file), TEACHER, honest.folder, settings=SETTINGS, device="cpu")
    assert again.record == honest.record
    assert (honest.folder / "run.json").stat().st_mtime_ns == before


def test_a_folder_with_another_run_is_refused(honest: Run, toy_file: Path) -> None:
    other = TrainSettings(recipe=RECIPE, seed=4)
    with pytest.raises(StoreError, match=r"holds another run \(settings.seed is 0 there, 4 was asked\)"):
        train(str(toy_file), TEACHER, honest.folder, settings=other, device="cpu")
    with (
        pytest.raises(StoreError, match="command is train there, audit was asked"),
        claim(honest.folder, {"command": "audit"}),
    ):
        pass


def test_a_folder_with_other_files_is_refused(tmp_path: Path, toy_file: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(StoreError, match="holds files that are no run"):
        train(str(toy_file), TEACHER, tmp_path, settings=SETTINGS)
    with pytest.raises(StoreError, match="is a file"):
        train(str(toy_file), TEACHER, tmp_path / "thesis.tex", settings=SETTINGS)
    assert (tmp_path / "thesis.tex").read_text() == "do not lose me"


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    request = {"command": "train"}
    refused = pytest.raises(StoreError, match="Another process is working")
    with claim(tmp_path / "run", request), refused, claim(tmp_path / "run", request):
        pass
    with claim(tmp_path / "run", request) as place:
        assert not place.finished


def test_unfinished_missing_and_damaged_runs_are_named(honest: Run, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no run folder"):
        Run.open(tmp_path / "absent")
    with pytest.raises(StoreError, match="no run of undistill"):
        Run.open(tmp_path)
    folder = copy(honest, tmp_path / "copy")
    weights = folder / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match="not the file that this run wrote"):
        Run.open(folder).network()
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"shape": "large"}))
    with pytest.raises(StoreError, match=r"run\.json is damaged: shape"):
        Run.open(folder)
    (folder / "run.json").write_text((folder / "run.json").read_text()[:50])
    with pytest.raises(StoreError, match=r"run\.json is damaged"):
        Run.open(folder)
    (folder / "run.json").unlink()
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "request.json").write_text('{"command": "audit"}')
    with pytest.raises(StoreError, match=r"another command \(audit\), not of a model"):
        Run.open(tmp_path / "audit")
    with pytest.raises(StoreError, match="unfinished: run the command"):
        Run.open(folder)


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, **toy_arrays())
    run = train(str(path), TEACHER, tmp_path / "run", settings=SETTINGS, device="cpu")
    assert run.data().digest == run.record["data_sha256"]
    np.savez(path, **toy_arrays(seed=9))
    with pytest.raises(StoreError, match="no longer holds the images"):
        run.data()


def test_network_is_the_trained_one(honest: Run) -> None:
    a, b, fresh = honest.network(), honest.network(), honest.fresh(0)
    images = torch.rand(2, *honest.shape)
    assert torch.equal(a(images), b(images))
    assert not torch.equal(a(images), fresh(images))
    assert not a.training
    assert honest.model(Model.parse("PlainCNN")) == Model.parse(TEACHER), "only the user's code is named again"
