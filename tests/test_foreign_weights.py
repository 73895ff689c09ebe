"""Weights of strangers: converted where nothing is lost, refused where they cannot be held, and never executed."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import NASTY, STUDENT, TEACHER
from tests.test_cli import call, refused
from undistill.api import audit
from undistill.core import files
from undistill.core.errors import FileError, ModelError, NonFinite
from undistill.models import Model, load_weights
from undistill.runs.run import Run


def weights(**changed: object) -> dict[str, torch.Tensor]:
    state = Model.parse(STUDENT).build((1, 12, 12), 3, 0).state_dict()
    return {name: value.clone() for name, value in state.items()} | changed  # type: ignore[return-value]


def final() -> str:
    return [name for name in weights() if name.endswith("weight")][-1]


UNFIT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "too large for fp32": (
        lambda w: torch.full_like(w, 1e300, dtype=torch.float64),
        "NaN or infinity as torch.float32",
    ),
    "NaN": (lambda w: torch.full_like(w, float("nan")), "NaN or infinity"),
    "complex": (lambda w: torch.full_like(w, float("nan"), dtype=torch.complex64), "is complex; convert"),
    "sparse": (lambda w: w.to_sparse(), "is sparse; convert"),
    "meta": (lambda w: w.to("meta"), "is without data; convert"),
    "quantised": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantised|damaged, or no plain"),
    "one number seen often": (lambda w: torch.zeros(1).expand(10**9), "another architecture"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_weights_that_the_network_cannot_hold_are_refused(what: str, tmp_path: Path) -> None:
    change, said = UNFIT[what]
    torch.save(weights(**{final(): change(weights()[final()])}), tmp_path / "x.pt")
    with pytest.raises(ModelError, match=said):
        load_weights(Model.parse(STUDENT).build((1, 12, 12), 3, 0), tmp_path / "x.pt")


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_another_precision_are_converted(kind: torch.dtype, tmp_path: Path) -> None:
    torch.save({name: w.to(kind) if w.is_floating_point() else w for name, w in weights().items()}, tmp_path / "x.pt")
    network = Model.parse(STUDENT).build((1, 12, 12), 3, 1)
    load_weights(network, tmp_path / "x.pt")
    assert torch.equal(network.state_dict()[final()], weights()[final()].to(kind).float())


def test_numbers_that_whole_numbers_cannot_hold_are_refused(honest: Run, tmp_path: Path) -> None:
    state = weights()
    name = next(name for name in state if name.endswith("num_batches_tracked"))
    for value in (float("nan"), float("inf"), 0.5):
        torch.save(state | {name: torch.tensor(value)}, tmp_path / "x.pt")
        with pytest.raises(ModelError, match="not usable"):
            load_weights(Model.parse(STUDENT).build((1, 12, 12), 3, 0), tmp_path / "x.pt")


ANSWERS_NAN: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "a negative variance": lambda w: {name: torch.full_like(w[name], -1) for name in w if name.endswith("running_var")},
    "huge weights": lambda w: {name: torch.full_like(w[name], 3e38) for name in w if name.endswith("weight")},
}


@pytest.mark.parametrize("what", ANSWERS_NAN)
def test_finite_weights_whose_answers_are_not_finite_are_refused(
    what: str, honest: Run, toy_file: Path, tmp_path: Path
) -> None:
    good = load_file(honest.folder / "weights.safetensors")
    save_file(good | ANSWERS_NAN[what](good), tmp_path / "x.safetensors")
    words = ["--data", toy_file, "--model", TEACHER, "--weights", tmp_path / "x.safetensors", "--set=recipe.epochs=0"]
    refused(call("train", *words, "--out", tmp_path / "run"), "x.safetensors: The network answers NaN or infinity to")
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_audit_of_a_network_that_answers_nan_ends_before_it_trains(honest: Run, victim: Run, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(victim.folder, tmp_path / "broken"))
    shutil.rmtree(broken / "answers", ignore_errors=True)
    state = load_file(broken / "weights.safetensors")
    save_file(state | ANSWERS_NAN["a negative variance"](state), broken / "weights.safetensors")
    record = json.loads((broken / "run.json").read_text())
    record["weights_sha256"] = files.sha256(broken / "weights.safetensors")
    (broken / "run.json").write_text(json.dumps(record))
    with pytest.raises(NonFinite, match=r"broken: The network answers NaN or infinity"):
        audit(broken, tmp_path / "audit", honest=honest, students=[STUDENT], device="cpu")
    assert not (tmp_path / "audit").exists()


def test_students_that_answer_nan_are_diverged(victim: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom undistill import Access, Attack\n\n\nclass Broken(Attack):\n    needs = Access.QUERY\n\n"
        "    def run(self, oracle, fresh, data, fit):\n        student = fresh()\n"
        "        for value in student.buffers():\n            value.fill_(-1)\n        return student\n"
    )
    report = audit(
        victim, tmp_path / "a", students=[STUDENT], seeds=1, attacks=[f"{tmp_path / 'mine.py'}:Broken"], device="cpu"
    )
    lost = [cell for cell in report.cells if "Broken" in cell.attack]
    assert len(lost) == 2
    assert all("answers NaN or infinity to" in cell.diverged for cell in lost)
    assert "diverged" in {flag.name for flag in report.flags}


def nested(depth: int) -> bytes:
    """{((((), ()), ((), ())), ...): 1}, each pair made of one thing twice."""
    pairs = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))
    return b"\x80\x02}(" + b")" + pairs + b"K\x01u."


@pytest.mark.parametrize("what", ["hash", "executes", "compressed", "bytes"])
def test_hostile_torch_files_are_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    if what == "hash":
        members[pickled] = nested(60)
        monkeypatch.setattr("undistill.core.tensors.SECONDS", 2.0)
    if what == "executes":
        members[pickled] = pickle.dumps(os.system, protocol=2)[:-1] + b"(X\x04\x00\x00\x00exittR."
    if what == "bytes":
        members[pickled] = b"\x80\x02c__builtin__\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x10tR."  # 64 GiB of them
    packing = zipfile.ZIP_DEFLATED if what == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "x.pt", "w", packing) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises((ModelError, FileError), match=r"damaged, or no plain state dict|cannot be read here"):
        load_weights(Model.parse(STUDENT).build((1, 8, 8), 3, 0), tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.jsonl"])
def test_huge_files_are_not_even_hashed(name: str, honest: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(honest.folder, tmp_path / "run"))
    os.truncate(run / name, 10**12)
    for command in (["protect", run, "--defence", NASTY, "--out", tmp_path / "out"], ["figure", "training", run]):
        if (name == "metrics.jsonl") == (command[0] == "figure"):
            assert call(*command).exit_code == 2
