"""Black boxes: models that answer and cannot be opened, audited as networks are."""

import json
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
from undistill.core.errors import SpecError, UndistillError, VictimError
from undistill.data.views import to_float
from undistill.models.adapter import NORMALISATIONS
from undistill.runs.contact import LOOKED_AT, MOST_LOOKED, PROBES, Contact
from undistill.runs.run import Run
from undistill.victims.answer import Answer, Form
from undistill.victims.black_box import BlackBox, Outputs, Reading, reading_of
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


def test_how_it_is_asked_is_in_no_key(box, toy_file: Path, tmp_path: Path) -> None:
    """After an error one asks more slowly; nothing is paid again for that."""
    first = Contact.make(box("predict"), str(toy_file), tmp_path / "bought")
    again = Contact.make(box("predict", ", size=3"), str(toy_file), tmp_path / "bought")
    assert (again.identity, again.digest) == (first.identity, first.digest)
    assert again.victim()._batch_size == 3


def test_a_first_look_that_was_stopped_goes_on(box, toy_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Contact, "_look", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            Contact.make(box("predict"), str(toy_file), tmp_path / "bought")
    monkeypatch.undo()
    contact = Contact.make(box("predict"), str(toy_file), tmp_path / "bought")
    assert contact.purchases.billed == 2 * 8 + 64 + 8  # the probes twice, the look, and the probes once again


def test_the_advice_of_a_first_look_can_be_followed_at_once(box, toy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(VictimError, match="with preprocess"):
        Contact.make(box("bright"), str(toy_file), tmp_path / "bought")
    contact = Contact.make(box("bright", ", preprocess='255'"), str(toy_file), tmp_path / "bought")
    assert contact.known.looked


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
        BlackBox.parse(contact.record["model"]).connect((1, 12, 12), ("0", "1", "2"), print)


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
    assert reached["bought"] <= most <= 1.2 * reached["bought"] + MOST_LOOKED


def test_looking_asks_no_normalisation_twice_and_bills_what_was_answered(
    code: str, toy_file: Path, tmp_path: Path
) -> None:
    """A model that knows none of these images is tried in every usual way, as a dry run has said."""
    with np.load(toy_file) as held:
        arrays = dict(held)
    arrays["images"] = np.random.default_rng(0).integers(0, 256, arrays["images"].shape, np.uint8)
    np.savez(tmp_path / "noise.npz", **arrays)
    contact = Contact.make(f"Function('{code}:predict')", str(tmp_path / "noise.npz"), tmp_path / "bought")
    asked = contact.purchases.billed - 2 * PROBES
    assert asked <= MOST_LOOKED - 4 * PROBES
    assert asked == LOOKED_AT * (1 + len([one for one in NORMALISATIONS.values() if len(one.mean) in (0, 1)]))


@pytest.mark.slow
def test_a_file_that_was_exported_from_timm_is_audited_end_to_end(boxes: None, toy_file: Path, tmp_path: Path) -> None:
    """With random weights: what is shown is that such a file is asked rightly, not that it knows anything."""
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=3, in_chans=1).eval()
    images, path = torch.rand(2, 1, 12, 12), tmp_path / "timm.onnx"
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(network, (images,), path, dynamo=False, **names)
    report = audited(f"Onnx('{path}')", tmp_path / "a", toy_file)
    assert report.pairs[0].reached
    assert (report.pairs[0].reached.output, report.pairs[0].reached.form) == ("logits", "full")
    answer = Contact.make(f"Onnx('{path}')", str(toy_file), tmp_path / "bought").victim().answer(images)
    with torch.no_grad():
        assert torch.allclose(answer.log_p, network(images).log_softmax(1), atol=1e-4)
