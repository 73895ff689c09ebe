"""Recorded answers, and files of ONNX, as black boxes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import RECIPE, STUDENT
from tests.test_black_boxes import audited
from undistill.api import audit
from undistill.auditing.schema import Report
from undistill.core.errors import VictimError
from undistill.data.views import to_float
from undistill.runs.contact import Contact
from undistill.runs.run import Run
from undistill.victims.endpoint import image_keys, keys_of


def recorded(folder: Path, run: Run, **parts: Any) -> str:
    """The text of a `Recorded` with the answers of `run` to all its images, changed by `parts`."""
    data = run.data()
    images = torch.cat([data.train.pixels, data.test.pixels])
    with torch.no_grad():
        probabilities = run.network()(to_float(images)).softmax(1).numpy()
    arrays = {"images": images.numpy(), "probabilities": probabilities} | parts
    np.savez(folder / "answers.npz", **{name: value for name, value in arrays.items() if value is not None})
    return f"Recorded('{folder / 'answers.npz'}')"


def test_recorded_answers_are_audited_without_asking_anybody(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    report = audited(recorded(tmp_path, honest), tmp_path / "a", toy_file)
    asked = [cell for cell in report.cells if cell.side == "victim"]
    assert asked
    assert all("once=True" in cell.attack and cell.queries == cell.distinct for cell in asked)
    measured = audit(honest, tmp_path / "b", honest="none", students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")
    assert report.victim.accuracy == measured.victim.accuracy


def test_hashes_stand_for_images(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    data = honest.data()
    hashes = np.array(keys_of(data.train) + keys_of(data.test))
    images = torch.cat([data.train.pixels, data.test.pixels])
    assert hashes.tolist() == image_keys(to_float(images))
    report = audited(recorded(tmp_path, honest, images=None, hashes=hashes), tmp_path / "a", toy_file)
    assert report.victim.accuracy > 0.9


def test_thieves_get_the_images_whose_answers_were_recorded(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    data = honest.data()
    some = torch.cat([data.train.pixels[::2], data.test.pixels])
    with torch.no_grad():
        p = honest.network()(to_float(some)).softmax(1).numpy()
    report = audited(recorded(tmp_path, honest, images=some.numpy(), probabilities=p), tmp_path / "a", toy_file)
    most = max(cell.threat.images for cell in report.cells if cell.threat)
    assert most <= len(data.train.pixels[::2])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"images": None}, "it needs images, or hashes of them"),
        ({"probabilities": None}, "holds no answers"),
        ({"probabilities": np.ones((5, 3)) / 3}, "images and 5 answers"),
        ({"images": np.zeros((2, 12, 12), np.float32)}, "must be uint8"),
        ({"images": None, "hashes": np.array(["abc"])}, "is no SHA-256"),
        ({"images": np.zeros((110, 12, 12), np.uint8)}, "lacks the answers"),
    ],
)
def test_bad_records_are_one_sentence(parts, said: str, honest: Run, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(VictimError, match=said):
        audited(recorded(tmp_path, honest, **parts), tmp_path / "a", toy_file)


def test_recorded_answers_of_a_classifier_that_is_no_network(tmp_path: Path) -> None:
    """Scikit-learn's digits, sorted by logistic regression."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits = load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    model = LogisticRegression(max_iter=200).fit(images[:400].reshape(400, -1), labels[:400])
    answers = model.predict_proba(images.reshape(len(images), -1))
    np.savez(tmp_path / "answers.npz", images=images, probabilities=answers)
    recipe = RECIPE.model_copy(update={"epochs": 1})
    box = f"Recorded('{tmp_path / 'answers.npz'}')"
    report = audited(box, tmp_path / "a", tmp_path / "data.npz", recipe=recipe)
    assert report.victim.accuracy > 0.85
    assert report.verdict.leak_hard is not None


# ONNX


@pytest.fixture(scope="module")
def onnx_file(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    batch = torch.export.Dim("batch")
    images = torch.rand(2, *honest.shape)
    torch.onnx.export(
        honest.network(), (images,), file, dynamo=True, dynamic_shapes=({0: batch},), input_names=["x"], verbose=False
    )
    return file


def test_an_onnx_file_gets_the_cells_of_its_network(onnx_file, alone: Report, toy_file: Path, tmp_path: Path) -> None:
    report = audited(f"Onnx('{onnx_file}')", tmp_path / "a", toy_file)
    assert report.victim.accuracy == alone.victim.accuracy
    for ours, theirs in zip(report.cells, alone.cells, strict=True):
        assert abs(ours.accuracy - theirs.accuracy) <= 0.05
        assert ours.queries == theirs.queries


def test_a_twin_may_stand_beside_a_black_box(onnx_file, honest: Run, toy_file: Path, tmp_path: Path) -> None:
    report = audited(f"Onnx('{onnx_file}')", tmp_path / "a", toy_file, honest=honest)
    assert report.twin
    assert report.twin.divergence < 1e-3
    assert report.twin.agreement == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (", input='image'", "no input 'image'; it has x"),
        (", result='p'", "no output 'p'"),
        (", layout='NHWC'", "takes images"),
    ],
)
def test_names_that_a_file_does_not_have(onnx_file, fields: str, said: str, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(VictimError, match=said):
        audited(f"Onnx('{onnx_file}'{fields})", tmp_path / "a", toy_file)


def test_files_that_are_no_onnx(onnx_file, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(VictimError, match="There is no file"):
        audited(f"Onnx('{tmp_path}/none.onnx')", tmp_path / "a", toy_file)
    (tmp_path / "bad.onnx").write_bytes(onnx_file.read_bytes()[:-40])
    with pytest.raises(VictimError, match="cannot be run by onnxruntime"):
        audited(f"Onnx('{tmp_path}/bad.onnx')", tmp_path / "a", toy_file)


def test_custom_operators_are_not_loaded(toy_file: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Steal", ["x"], ["y"], domain="com.stranger")
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, ["b", 1, 12, 12])], [value("y", 1, ["b", 3])])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.stranger", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(VictimError, match=r"Custom operators are not loaded"):
        audited(f"Onnx('{tmp_path}/m.onnx')", tmp_path / "a", toy_file)
    assert ort


def test_a_fixed_batch_size_and_channels_last(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = honest.network()

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.network(images.permute(0, 3, 1, 2)).softmax(1)
            return out

    images = torch.rand(3, 12, 12, 1)
    torch.onnx.export(Last().eval(), (images,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    contact = Contact.make(f"Onnx('{tmp_path}/m.onnx')", str(toy_file), tmp_path / "bought")
    some = to_float(honest.data().test.pixels[:7])
    with torch.no_grad():
        expected = honest.network()(some).log_softmax(1)
    assert torch.allclose(contact.victim().answer(some).log_p, expected, atol=1e-4)


def test_true_labels_beside_answers_are_left_out(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    data = honest.data()
    labels = torch.cat([data.train.labels, data.test.labels]).numpy()
    beside = {"labels": labels}, {"classes": np.array(["a", "b", "c"])}, {"classes": labels}
    for number, more in enumerate(beside):
        contact = Contact.make(recorded(tmp_path, honest, **more), str(toy_file), tmp_path / str(number))
        images = to_float(data.test.pixels)
        with torch.no_grad():
            expected = honest.network()(images).log_softmax(1)
        assert torch.allclose(contact.victim().answer(images).log_p, expected, atol=1e-4)


def test_a_twin_needs_answers_to_validation_images(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(VictimError, match=r"lacks the answers to 10 of 10 validation images.*leave out --honest"):
        audited(recorded(tmp_path, honest), tmp_path / "a", toy_file, honest=honest)


def test_thieves_who_make_images_are_left_out_of_recorded_answers(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    box = recorded(tmp_path, honest)
    for attack in ("QuerySmoothing(once=True)", "DisGUIDE()"):
        with pytest.raises(VictimError.__base__, match="of which no answers were recorded"):
            audited(box, tmp_path / "a", toy_file, attacks=[attack])
    report = audited(box, tmp_path / "b", toy_file, suite="budget-1", budget=40, curve=True, trials=1)
    assert "FixMatch" in str([cell.attack for cell in report.cells])
