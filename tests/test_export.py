"""Exported folders answer as the run does, with torch or onnxruntime alone, and hold nothing beside."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tests.conftest import RECIPE, STUDENT
from tests.test_black_boxes import audited
from undistill.api import audit, export, protect
from undistill.cli.commands import app
from undistill.core.errors import ModelError, SpecError, StoreError
from undistill.data.views import to_float
from undistill.defences import Defence
from undistill.defences.defence import ResponseDefence
from undistill.runs.contact import Contact
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.ship.export import load
from undistill.ship.manifest import read_manifest
from undistill.victims.victim import NetworkVictim

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

RESPONSES = sorted(name for name, one in Defence.registry.items() if issubclass(one, ResponseDefence))
SOME = ("LinearCMI", "ModelGuardS", "TopK")
"""Of each kind one; the others take as long again, and are tried by `make slow`."""
NOT_IN_A_GRAPH = ("GradientRedirection", "MAD", "ModelGuardW")


def protected(honest: Run, out: Path, *defences: str) -> Run:
    return protect(honest, list(defences), out, settings=Settings(recipe=RECIPE), device="cpu")


@pytest.fixture(scope="module")
def sealed(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return protected(honest, tmp_path_factory.mktemp("runs") / "sealed", "Sealed(levels=2)")


@pytest.fixture(scope="module")
def folder(sealed: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(sealed, tmp_path_factory.mktemp("exports") / "sealed")


def shown(run: Run, images: torch.Tensor) -> torch.Tensor:
    answer = NetworkVictim.of(run.network()).answer(images)
    return answer.log_p.exp()


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_both_files_answer_as_the_run_does(runtime: str, folder: Path, sealed: Run) -> None:
    images = to_float(sealed.data().test.pixels)
    predict, expected = load(folder)(runtime), shown(sealed, images)
    for count in (1, 2, len(images)):
        (p,) = predict(images[:count].numpy() if runtime == "onnx" else images[:count])
        assert torch.allclose(torch.as_tensor(p), expected[:count], atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
        for name in RESPONSES
        if name not in NOT_IN_A_GRAPH
    ],
)
def test_every_response_that_can_be_in_a_graph_is_in_it(name: str, honest: Run, tmp_path: Path) -> None:
    run = protected(honest, tmp_path / "run", f"{name}()")
    to = export(run, tmp_path / "export", format="onnx")
    images = to_float(run.data().test.pixels)
    outputs = load(to)("onnx")(images.numpy())
    answer = NetworkVictim.of(run.network()).answer(images)
    if len(outputs) == 2:
        values, classes = map(torch.as_tensor, outputs)
        assert torch.equal(classes[:, 0], answer.top)
        assert torch.allclose(values, answer.log_p.gather(1, classes).exp(), atol=1e-4)
        assert values.shape[1] == int(answer.shown.sum(1).max())
    else:
        (p,) = map(torch.as_tensor, outputs)
        assert torch.allclose(p, answer.log_p.exp(), atol=1e-4)
        assert torch.equal(p.argmax(1), answer.log_p.exp().argmax(1))


@pytest.mark.parametrize("name", NOT_IN_A_GRAPH)
def test_what_cannot_be_in_a_graph_is_refused_with_the_alternative(name: str, honest: Run, tmp_path: Path) -> None:
    run = protected(honest, tmp_path / "run", f"{name}()")
    with pytest.raises(ModelError, match=r"cannot be in a graph: .*the run itself.* Sealed"):
        export(run, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_nothing_of_the_clean_answers_nor_of_the_machine_is_in_the_files(folder: Path, sealed: Run) -> None:
    import onnx

    model = onnx.load(folder / "model.onnx")
    assert [one.name for one in model.graph.output] == ["probabilities"]
    assert [one.name for one in model.graph.input] == ["images"]
    assert not model.graph.value_info
    for file in folder.iterdir():
        content = file.read_bytes()
        for word in (b"undistill/", b"site-packages", str(sealed.folder.parent).encode(), b"stack_trace"):
            assert word not in content, (file.name, word)


def test_an_exported_file_is_audited_as_its_run(folder: Path, sealed: Run, toy_file: Path, tmp_path: Path) -> None:
    options = {"students": [STUDENT], "seeds": 1, "recipe": RECIPE, "device": "cpu"}
    own = audit(sealed, tmp_path / "a", honest="none", **options)
    other = audited(f"Onnx('{folder / 'model.onnx'}')", tmp_path / "b", toy_file)
    assert other.victim.accuracy == own.victim.accuracy
    assert other.victim.nll == pytest.approx(own.victim.nll, abs=1e-4)
    for ours, theirs in zip(own.cells, other.cells, strict=True):
        assert (ours.attack, ours.queries) == (theirs.attack, theirs.queries)


def test_a_file_that_shows_the_highest_answers_is_asked_for_these(honest: Run, toy_file: Path, tmp_path: Path) -> None:
    run = protected(honest, tmp_path / "run", "TopK(k=2)")
    to = export(run, tmp_path / "export", format="onnx")
    images = to_float(run.data().test.pixels)
    answer = Contact.make(f"Onnx('{to / 'model.onnx'}')", str(toy_file), tmp_path / "bought").victim().answer(images)
    expected = NetworkVictim.of(run.network()).answer(images)
    assert torch.equal(answer.shown, expected.shown)
    assert torch.allclose(answer.log_p, expected.log_p, atol=1e-4)


def test_the_card_says_what_was_protected_and_found(sealed: Run, tmp_path: Path) -> None:
    options = {"students": [STUDENT], "seeds": 2, "recipe": RECIPE, "device": "cpu", "curve": True}
    report = audit(sealed, tmp_path / "audit", **options)
    folder = export(sealed, tmp_path / "e", format="onnx", audit=tmp_path / "audit")
    card, manifest = (folder / "README.md").read_text(), read_manifest(folder)
    assert report.verdict.sentence in card
    assert manifest.bits is not None
    assert manifest.audited
    assert manifest.audited.best_copy <= 1
    for words in ("Sealed(levels=2", "strip", "bits beyond its label", manifest.identity, "Nothing of undistill"):
        assert words in card
    assert set(manifest.files) == {"README.md", "model.onnx", "model.py"}


def test_a_card_gets_the_verdict_later(sealed: Run, tmp_path: Path) -> None:
    folder = export(sealed, tmp_path / "e", format="onnx")
    assert "Not audited" in (folder / "README.md").read_text()
    report = audit(sealed, tmp_path / "a", honest="none", students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")
    export(sealed, tmp_path / "e", format="onnx", audit=tmp_path / "a")
    assert report.verdict.sentence in (folder / "README.md").read_text()
    assert read_manifest(folder).audited


def test_an_audit_of_another_model_is_refused(sealed: Run, honest: Run, alone, tmp_path: Path) -> None:
    audit(honest, tmp_path / "a", honest="none", students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")
    with pytest.raises(StoreError, match="is the audit of another model"):
        export(sealed, tmp_path / "e", audit=tmp_path / "a")


def test_a_repeated_export_is_instant_and_another_is_refused(folder: Path, sealed: Run, honest: Run) -> None:
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert export(sealed, folder) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(StoreError, match="holds another export"):
        export(honest, folder)


def test_folders_of_somebody_else_are_left_alone(sealed: Run, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(StoreError, match="no exported folder"):
        export(sealed, tmp_path / "notes")
    with pytest.raises(SpecError, match="did you mean 'torch'"):
        export(sealed, tmp_path / "e", format="troch")  # type: ignore[arg-type]


def test_a_changed_file_is_noticed(sealed: Run, tmp_path: Path) -> None:
    folder = export(sealed, tmp_path / "e", format="onnx")
    (folder / "model.onnx").write_bytes(b"another")
    with pytest.raises(StoreError, match=r"model\.onnx is missing or not the file"):
        read_manifest(folder)


def test_a_stopped_export_leaves_nothing(sealed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undistill.ship.export.write_onnx", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export(sealed, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_an_unfaithful_file_is_not_exported(sealed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda runtime: lambda images: [1 - np.eye(3, dtype=np.float32)[np.zeros(len(images), int)]]  # noqa: E731
    monkeypatch.setattr("undistill.ship.export.load", lambda folder: wrong)
    with pytest.raises(ModelError, match="otherwise than the run"):
        export(sealed, tmp_path / "e", format="onnx")
    assert not (tmp_path / "e").exists()


class Depends(nn.Module):
    """A network that no graph can hold, since it looks at the values of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(144, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(images.flatten(1))
        return out if float(images.mean()) > 0.5 else 2 * out


def test_a_network_that_cannot_be_traced_is_one_sentence(toy_file: Path, tmp_path: Path) -> None:
    from undistill.api import adopt

    network = Depends()
    run = adopt(network, str(toy_file), tmp_path / "run")
    with pytest.raises(ModelError, match=r"cannot be made a graph of"):
        export(run, tmp_path / "e", model=network)
    assert not (tmp_path / "e").exists()


def test_the_folder_runs_without_this_package(folder: Path, sealed: Run, tmp_path: Path) -> None:
    """In a process that cannot import undistill; `make test-bare` does it in environments of their own."""
    images = to_float(sealed.data().test.pixels[:5])
    np.save(tmp_path / "images.npy", images.numpy())
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['undistill'] = None\n"
        "import numpy, model\n"
        "images = numpy.load(sys.argv[2])\n"
        "for runtime in ('onnx', 'torch'):\n"
        "    (p,) = model.load(runtime)(images)\n"
        "    print(numpy.asarray(p).argmax(1).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "images.npy")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = str(shown(sealed, images).argmax(1).tolist())
    assert done.stdout.split("\n")[:2] == [expected, expected]


def test_the_command_line(sealed: Run, tmp_path: Path) -> None:
    words = ["export", str(sealed.folder), "--to", str(tmp_path / "e"), "--format", "onnx"]
    said = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert said.exit_code == 0, said.output
    assert re.search(r"model\.onnx.*answer \d+ validation images as the run does", said.output.replace("\n", " "))
    assert json.loads((tmp_path / "e" / "manifest.json").read_text())["outputs"] == ["probabilities"]
