"""Black boxes: models that answer and cannot be opened, audited as networks are."""

import json
import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.conftest import RECIPE, STUDENT
from undistill.api import audit
from undistill.auditing.schema import Cell, Report
from undistill.cli.commands import app
from undistill.core.errors import SpecError, StoreError, UndistillError, VictimError
from undistill.data.views import to_float
from undistill.runs.contact import Contact
from undistill.runs.run import Run
from undistill.victims.answer import Answer, Form
from undistill.victims.black_box import BlackBox, Outputs, Reading, reading_of
from undistill.victims.endpoint import Endpoint, image_keys, keys_of
from undistill.victims.purchases import Purchases

PREDICT = """
import torch
from undistill import Run

network = Run.open({folder!r}).network()
calls = []


def predict(images):
    calls.append(len(images))
    with torch.no_grad():
        return network(torch.from_numpy(images)).softmax(1).numpy()


def logits(images):
    with torch.no_grad():
        return network(torch.from_numpy(images)).numpy()


def labels(images):
    return predict(images).argmax(1)


def shuffled(images):
    return predict(images)[:, [2, 0, 1]]


def wide(images):
    return predict(255 * images.clip(0, 1))


def bright(images):
    return predict(images / 255)


def varying(images):
    noise = torch.rand(len(images), 3).numpy() * 0.3
    answers = predict(images) + noise
    return answers / answers.sum(1, keepdims=True)


def more(images):
    return predict(images)[:, [0, 1, 2, 0]]


def sigmoids(images):
    return predict(images) * 0.5


def broken(images):
    return predict(images) * float("nan")


def failing(images):
    raise RuntimeError("no memory")
"""


@pytest.fixture(scope="module")
def code(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("code") / "predict.py"
    file.write_text(PREDICT.format(folder=str(honest.folder)))
    return str(file)


@pytest.fixture
def box(code: str) -> Callable[..., str]:
    return lambda name, more="": f"Function('{code}:{name}'{more})"


def audited(victim: str, out: Path, toy_file: Path, **options: Any) -> Report:
    asked = {"students": [STUDENT], "seeds": 1, "recipe": RECIPE, "device": "cpu"} | options
    return audit(victim, out, data=str(toy_file), **asked)


def values(cells: list[Cell]) -> list[tuple[object, ...]]:
    return [(c.attack, c.seed, c.accuracy, c.fidelity, c.queries, c.distinct) for c in cells]


@pytest.fixture(scope="module")
def alone(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("alone")
    return audit(honest, out, honest="none", students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")


def test_a_function_gets_the_cells_of_the_network_in_it(box, alone: Report, toy_file: Path, tmp_path: Path) -> None:
    report = audited(box("predict"), tmp_path / "a", toy_file)
    assert values(report.cells) == values(alone.cells)
    assert report.victim.accuracy == alone.victim.accuracy
    reached = report.pairs[0].reached
    assert reached
    assert (reached.output, reached.form, reached.lost) == ("probabilities", "full", 0)
    html = (tmp_path / "a" / "report.html").read_text()
    assert f"It answered {reached.billed:,} images" in html


def test_every_answer_is_paid_once(box, toy_file: Path, tmp_path: Path) -> None:
    """All thieves see the same views, and share their answers; a repeated audit asks nobody."""
    reached = audited(box("predict"), tmp_path / "a", toy_file).pairs[0].reached
    assert reached
    assert reached.billed == reached.bought + 8  # which were asked a second time, to see whether answers repeat
    again = audited(box("predict"), tmp_path / "a", toy_file).pairs[0].reached
    assert again == reached


def test_a_stopped_audit_pays_for_no_image_twice(box, toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    whole = audited(box("predict"), tmp_path / "whole", toy_file).pairs[0].reached
    add, added = Purchases.add, []

    def stop(self: Purchases, keys: list[str], served: Tensor) -> None:
        add(self, keys, served)
        added.append(len(keys))
        if len(added) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Purchases, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        audited(box("predict"), tmp_path / "b", toy_file)
    monkeypatch.undo()
    resumed = audited(box("predict"), tmp_path / "b", toy_file).pairs[0].reached
    assert whole
    assert resumed
    assert resumed.bought == whole.bought
    assert resumed.billed - whole.billed in (0, 8)  # the probes are asked again before more is bought


def test_audits_that_share_a_ledger_pay_once(box, toy_file: Path, tmp_path: Path) -> None:
    first = audited(box("predict"), tmp_path / "a", toy_file, ledger=tmp_path / "ledger").pairs[0].reached
    second = audited(box("predict"), tmp_path / "b", toy_file, ledger=tmp_path / "ledger").pairs[0].reached
    assert first == second


def test_answers_that_vary_are_noticed_and_never_shared(box, toy_file: Path, tmp_path: Path) -> None:
    report = audited(box("varying"), tmp_path / "a", toy_file)
    assert "answers_vary" in [flag.name for flag in report.flags]
    contact = Contact.planned(box("varying"), str(toy_file), tmp_path / "a-bought")
    assert contact.found
    assert not contact.found.repeatable
    images = to_float(contact.data().test.pixels[:4])
    victim = contact.victim()
    one, again, other = (victim.answer(images, at).log_p for at in ("thief/0", "thief/0", "thief/4"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_replaced_model_is_noticed_before_more_is_bought(
    honest: Run, victim: Run, toy_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "predict.py"
    file.write_text(PREDICT.format(folder=str(honest.folder)))
    where = tmp_path / "now"
    file.write_text(
        f"from pathlib import Path\nimport torch\nfrom undistill import Run\n"
        f"def predict(images):\n"
        f"    network = Run.open(Path({str(where)!r}).read_text()).network()\n"
        f"    with torch.no_grad():\n        return network(torch.from_numpy(images)).softmax(1).numpy()\n"
    )
    where.write_text(str(honest.folder))
    Contact.make(f"Function('{file}:predict')", str(toy_file), tmp_path / "bought")
    where.write_text(str(victim.folder))
    contact = Contact.make(f"Function('{file}:predict')", str(toy_file), tmp_path / "bought")
    with pytest.raises(VictimError, match="no longer answers as it did"):
        contact.victim().answer(torch.rand(2, 1, 12, 12))


def test_a_pool_shares_the_ledger(box, alone: Report, toy_file: Path, tmp_path: Path) -> None:
    report = audited(box("predict"), tmp_path / "a", toy_file, launcher="Pool(workers=2)")
    assert values(report.cells) == values(alone.cells)


def test_class_order_and_normalisation_are_tried_and_named(box, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(VictimError, match=r"with preprocess='none', classes='2,0,1'"):
        audited(box("shuffled"), tmp_path / "a", toy_file)
    report = audited(box("shuffled", ", classes='2,0,1'"), tmp_path / "b", toy_file)
    assert report.victim.accuracy > 0.9
    with pytest.raises(VictimError, match=r"with preprocess='255'"):
        audited(box("bright"), tmp_path / "c", toy_file)
    assert audited(box("bright", ", preprocess='255'"), tmp_path / "d", toy_file).victim.accuracy > 0.9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("more", "answers 4 classes, and the data has 3"),
        ("sigmoids", "whose sums are"),
        ("broken", "NaN or infinity"),
        ("failing", "failed: RuntimeError: no memory"),
        ("absent", "No object in .* named 'absent'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(box, name: str, said: str, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UndistillError, match=said):
        audited(box(name), tmp_path / "a", toy_file)
    assert not (tmp_path / "a").exists()


def test_labels_alone(box, toy_file: Path, tmp_path: Path) -> None:
    report = audited(box("labels"), tmp_path / "a", toy_file)
    assert report.pairs[0].reached
    assert report.pairs[0].reached.form == "label"
    with pytest.raises(UndistillError, match=r"DKD.* needs answers of the form TOP, and this victim's show no more"):
        audited(box("labels"), tmp_path / "b", toy_file, attacks=["DKD()"])


def test_logits_are_read_as_such(box, toy_file: Path, tmp_path: Path, honest: Run) -> None:
    contact = Contact.make(box("logits"), str(toy_file), tmp_path / "bought")
    images = to_float(honest.data().test.pixels[:5])
    served = contact.victim().answer(images)
    assert torch.allclose(served.log_p, Answer.of_logits(honest.network()(images)).log_p.detach(), atol=1e-5)


def test_weights_of_a_black_box_are_refused(box, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UndistillError, match="needs the weights, and this victim is a black box"):
        audited(box("predict"), tmp_path / "a", toy_file, attacks=["ZSKT()"])


def test_a_black_box_needs_data_and_a_run_does_not(box, honest: Run, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name them: --data"):
        audit(box("predict"), tmp_path / "a")
    with pytest.raises(SpecError, match="leave out --data"):
        audit(honest, tmp_path / "a", data=str(toy_file))
    with pytest.raises(SpecError, match=r"No black box named 'Functio'; did you mean 'Function'"):
        audit("Functio('x.py:y')", tmp_path / "a", data=str(toy_file))


def test_a_stored_contact_runs_no_code(box, toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    contact = Contact.make(box("predict"), str(toy_file), tmp_path / "bought")
    monkeypatch.setattr("undistill.core.code._trusted", set())
    with pytest.raises(UndistillError, match="is code, and code named by a stored run is not executed"):
        BlackBox.parse(contact.record["model"]).connect((1, 12, 12), ("0", "1", "2"))


# recorded answers


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


# reading


def test_outputs_by_hand() -> None:
    order = (2, 0, 1)
    full = Reading("probabilities", Form.FULL, order)(Outputs(torch.tensor([[0.5, 0.3, 0.2]])))
    assert torch.allclose(full.log_p.exp(), torch.tensor([[0.2, 0.5, 0.3]]))
    top = Reading("probabilities", Form.TOP, order)(Outputs(torch.tensor([[0.6, 0.3]]), torch.tensor([[1, 0]])))
    assert top.shown.tolist() == [[False, True, True]]
    assert torch.allclose(top.log_p[top.shown].exp(), torch.tensor([0.3, 0.6]))
    label = Reading("labels", Form.LABEL, order)(Outputs(None, torch.tensor([[1]])))
    assert label.shown.tolist() == [[False, False, True]]
    assert label.top.tolist() == [2]


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (Outputs(torch.tensor([[0.5, 0.25, 0.25]])), "probabilities"),
        (Outputs(torch.tensor([[1.0, 0.0, 0.0]])), "probabilities"),
        (Outputs(torch.tensor([[0.334, 0.333, 0.32]])), "probabilities"),
        (Outputs(torch.tensor([[5.0, -2.0, 0.1]])), "logits"),
        (Outputs(torch.log(torch.tensor([[0.5, 0.25, 0.25]]))), "logits"),
        (Outputs(None, torch.tensor([[2]])), "labels"),
    ],
)
def test_the_kind_of_outputs_is_found(outputs: Outputs, kind: str) -> None:
    assert reading_of(outputs, "auto", (0, 1, 2)).kind == kind


@pytest.mark.parametrize(
    "outputs",
    [
        Outputs(torch.tensor([[0.5, 0.2, 0.2]])),
        Outputs(torch.tensor([[-0.1, 0.6, 0.5]])),
        Outputs(torch.tensor([[float("nan"), 0.6, 0.4]])),
        Outputs(torch.tensor([[0.5, 0.5]])),
        Outputs(None, torch.tensor([[1]])),
        Outputs(torch.tensor([[0.5]]), torch.tensor([[1]])),
    ],
)
def test_outputs_of_another_kind_are_refused(outputs: Outputs) -> None:
    with pytest.raises(VictimError):
        Reading("probabilities", Form.FULL, (0, 1, 2))(outputs)


@pytest.mark.parametrize("place", [3, -1])
def test_classes_that_there_are_not(place: int) -> None:
    with pytest.raises(VictimError, match="names classes"):
        Reading("labels", Form.LABEL, (0, 1, 2))(Outputs(None, torch.tensor([[place]])))


# the ledger


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


# the command line


def run_cli(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "80"})


def test_a_dry_run_says_how_many_answers_and_asks_nobody(box, toy_file: Path, tmp_path: Path) -> None:
    words = ["audit", box("failing"), "--data", str(toy_file), "--student", STUDENT, "--seeds", "1"]
    said = run_cli(*words, "--out", str(tmp_path / "a"), "--dry-run", "--cost-per-1000", "2.5")
    assert said.exit_code == 0, said.output
    assert "answers will be bought, which costs at most" in said.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_the_count_of_a_dry_run_holds(box, toy_file: Path, tmp_path: Path) -> None:
    words = ["audit", box("predict"), "--data", str(toy_file), "--student", STUDENT, "--seeds", "1"]
    words += ["--out", str(tmp_path / "a"), "--set", "recipe.epochs=3"]
    said = run_cli(*words, "--dry-run")
    most = int(said.output.split("At most ")[1].split()[0].replace(",", ""))
    assert run_cli(*words).exit_code == 0
    reached = json.loads((tmp_path / "a" / "report.json").read_text())["pairs"][0]["reached"]
    assert reached["bought"] <= most <= 1.5 * reached["bought"]
