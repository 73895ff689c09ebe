"""A gateway answers as a network with the same response would, before a model that stays as it is."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import RECIPE
from tests.serving.server import asked, infer, post, running
from undistill.api import export, protect
from undistill.core.errors import StoreError, UndistillError, VictimError
from undistill.data.views import to_float
from undistill.runs.contact import PROBES, Contact
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.serving.gateway import of_upstream
from undistill.serving.served import of_run
from undistill.victims.purchases import Purchases
from undistill.victims.victim import NetworkVictim

pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def onnx(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = export(honest, tmp_path_factory.mktemp("upstream") / "export", format="onnx")
    return f"Onnx('{folder / 'model.onnx'}')"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undistill.victims.http.PAUSE", 0.01)


@pytest.fixture
def upstream(honest: Run, tmp_path: Path) -> Iterator[str]:
    """The address of a server of ours, with the bare network behind it."""
    with running(of_run(honest.folder, device="cpu"), tmp_path / "upstream") as (url, _):
        yield url


@pytest.mark.parametrize("defences", [["Sealed(levels=2)"], ["Rounding(digits=1)"], ["Sealed(levels=2)", "TopK(k=2)"]])
def test_it_answers_as_a_run_with_the_same_responses(
    defences: list[str], onnx: str, honest: Run, toy_file: Path, tmp_path: Path
) -> None:
    served = of_upstream(onnx, defences, str(toy_file), tmp_path / "gateway")
    run = protect(honest, defences, tmp_path / "run", settings=Settings(recipe=RECIPE), device="cpu")
    images = to_float(honest.data().test.pixels)
    expected = NetworkVictim.of(run.network()).answer(images)
    with running(served, tmp_path) as (url, _):
        contact = Contact.make(f"Http('{url}')", str(toy_file), tmp_path / "bought")
        answer = contact.victim().answer(images)
    assert torch.equal(answer.shown, expected.shown)
    assert torch.allclose(answer.log_p.exp(), expected.log_p.exp(), atol=1e-5)


def test_calibration_images_go_through_the_model_once(
    upstream: str, toy_file: Path, tmp_path: Path, honest: Run
) -> None:
    spec, place = f"Http('{upstream}')", tmp_path / "gateway"
    first = of_upstream(spec, ["Sealed(levels=2)"], str(toy_file), place)
    bought = Purchases(place / "upstream" / "purchases.sqlite", 3)
    before, images = bought.billed, to_float(honest.data().validation.pixels)
    assert before <= 4 * PROBES + 64 + len(images)
    second = of_upstream(spec, ["Sealed(levels=2)"], str(toy_file), place)
    assert bought.billed == before + PROBES  # by which the model is recognised
    assert second.identity == first.identity
    assert np.array_equal(first.predict(images.numpy())[0], second.predict(images.numpy())[0])
    before = bought.distinct
    second.predict(np.random.default_rng(0).random((4, 1, 12, 12), np.float32))
    assert bought.distinct == before  # what is served is not kept


def test_a_model_that_was_replaced_is_noticed(
    honest: Run, victim: Run, toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(of_run(honest.folder, device="cpu"), tmp_path / "keys") as (url, server):
        of_upstream(f"Http('{url}')", ["Sealed(levels=2)"], str(toy_file), tmp_path / "gateway")
        server.batches.predict = of_run(victim.folder, device="cpu").predict
        with pytest.raises(VictimError, match="replaced"):
            of_upstream(f"Http('{url}')", ["Sealed(levels=2)"], str(toy_file), tmp_path / "gateway")


def test_a_model_that_fails_is_nobodys_bill_and_nobodys_business(
    onnx: str, toy_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = of_upstream(onnx, ["Sealed(levels=2)"], str(toy_file), tmp_path / "gateway")

    def down(images: np.ndarray) -> list[np.ndarray]:
        raise VictimError("http://10.0.0.7:9000 cannot be reached")

    with running(replace(served, predict=down), tmp_path) as (url, server):
        response = post(infer(url), asked(np.zeros((1, 1, 12, 12))))
        billed = server.keys.accounts(everybody=True)[0].billed
    assert response.status_code == 502
    assert "10.0.0.7" not in response.text
    assert billed == 0
    assert any("10.0.0.7" in str(getattr(record, "fields", "")) for record in caplog.records)


@pytest.mark.parametrize(
    ("defences", "why"),
    [
        ([], "needs a response"),
        (["Nasty(omega=0.04)"], "trains a network"),
        (["AdaptiveMisinformation()"], "trains a network of its own"),
        (["Sealed(levels=64)"], "needs 64"),
    ],
)
def test_what_cannot_stand_before_a_model_is_said(
    defences: list[str], why: str, onnx: str, toy_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UndistillError, match=why):
        of_upstream(onnx, defences, str(toy_file), tmp_path / "gateway")


def test_another_request_does_not_take_its_folder(onnx: str, toy_file: Path, tmp_path: Path) -> None:
    of_upstream(onnx, ["Rounding()"], str(toy_file), tmp_path / "gateway")
    with pytest.raises(StoreError, match="another run"):
        of_upstream(onnx, ["Sealed(levels=2)"], str(toy_file), tmp_path / "gateway")


def test_a_changed_table_is_not_served(onnx: str, toy_file: Path, tmp_path: Path) -> None:
    of_upstream(onnx, ["Sealed(levels=2)"], str(toy_file), tmp_path / "gateway")
    path = tmp_path / "gateway" / "gateway" / "response.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(StoreError, match="not the file"):
        of_upstream(onnx, ["Sealed(levels=2)"], str(toy_file), tmp_path / "gateway")


def test_an_upstream_that_is_down_leaves_no_trace_of_another_request(toy_file: Path, onnx: str, tmp_path: Path) -> None:
    with pytest.raises(VictimError, match="cannot be reached"):
        of_upstream("Http('http://127.0.0.1:1')", ["Rounding()"], str(toy_file), tmp_path / "state")
    of_upstream(onnx, ["Sealed(levels=2)"], str(toy_file), tmp_path / "state")


def test_an_audit_of_a_run_is_none_of_a_gateway(onnx: str, folder: Path, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not of this gateway"):
        of_upstream(onnx, ["Rounding()"], str(toy_file), tmp_path / "state", folder)
