"""Each bad input ends in one clear sentence and exit code 2; nothing is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from tests.conftest import FAST, NASTY, STUDENT, TEACHER, toy_arrays
from tests.test_official import write_idx
from undistill import __version__
from undistill.auditing.schema import Report
from undistill.cli import app
from undistill.data import MNIST
from undistill.runs.run import Run

SET = [part for pair in FAST for part in ("--set", pair)]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result: Result, said: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: "), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert said in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; sys.argv = ['undistill', '--help']\n"
        "from undistill.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'sklearn', 'matplotlib', 'pydantic', 'numpy'} & set(sys.modules), 'slow import'"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for command in ("demo", "train", "adopt", "protect", "audit", "report", "list", "data", "figure", "reproduce"):
        assert command in found.stdout


def test_version() -> None:
    assert call("--version").stdout.strip() == f"undistill {__version__}"


def test_from_train_to_report(toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", "--data", toy_file, "--model", TEACHER, *SET).exit_code == 0
    run = Path("runs/toy-ConvNet")
    assert Run.open(run).record["epochs"] == 6
    protected = call("protect", run, "--defence", NASTY)
    assert protected.exit_code == 0, protected.stderr
    assert "divergence T^2 KL" in protected.stdout
    audited = call("audit", "runs/toy-ConvNet-nasty", "--student", STUDENT, "--seeds", 2)
    assert audited.exit_code == 0, audited.stderr
    out = Path("runs/toy-ConvNet-nasty-audit")
    Report.model_validate_json((out / "report.json").read_text())
    assert str(out / "report.html") in audited.stdout
    assert max(map(len, audited.stdout.splitlines())) <= 80
    again = call("report", out)
    assert again.exit_code == 0
    assert again.stdout == audited.stdout


def test_config_file_and_set(toy_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "fast.yaml"
    config.write_text("seed: 5\nrecipe:\n  epochs: 2\n  views:\n    crop: 0\n")
    out = tmp_path / "run"
    words = ["train", "--data", toy_file, "--model", TEACHER, "--out", out, "--config", config]
    assert call(*words, "--set", "recipe.epochs=1").exit_code == 0
    settings = Run.open(out).record["settings"]
    assert (settings["seed"], settings["recipe"]["epochs"], settings["recipe"]["views"]["crop"]) == (5, 1, 0)


def test_protect_and_audit_start_from_the_recorded_recipe(honest: Run, tmp_path: Path) -> None:
    words = ["protect", honest.folder, "--defence", NASTY, "--out", tmp_path / "v", "--set", "recipe.epochs=1"]
    assert call(*words).exit_code == 0
    recipe = Run.open(tmp_path / "v").record["settings"]["recipe"]
    assert recipe == honest.record["settings"]["recipe"] | {"epochs": 1}


def test_fast_is_recorded_and_one_part_can_be_set_by_hand(toy_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "--data", toy_file, "--model", TEACHER, "--out", out, *SET, "--fast"]
    assert call(*words, "--set", "recipe.compute.layout=channels_last").exit_code == 0
    record = Run.open(out).record
    assert record["settings"]["recipe"]["compute"] == {
        "precision": "auto",
        "layout": "channels_last",
        "compile": "auto",
    }
    (compute,) = record["compute"]
    (trial,) = (json.loads(path.read_text()) for path in out.glob("autotune-*.json"))
    assert compute.startswith(trial["compute"]), "and on a GPU whether steps were replayed"
    assert trial["seconds"][trial["compute"]] == min(trial["seconds"].values())


def test_remember_says_how_much_is_kept(honest: Run, tmp_path: Path) -> None:
    kept = shutil.copytree(honest.folder, tmp_path / "honest", ignore=shutil.ignore_patterns("answers"))
    words = ["protect", kept, "--defence", NASTY]
    assert call(*words, "--out", tmp_path / "a", "--remember", 0).exit_code == 0
    assert not (kept / "answers").exists()
    assert call(*words, "--out", tmp_path / "b").exit_code == 0
    assert len(list(kept.glob("answers/*/*.safetensors"))) == Run.open(tmp_path / "b").record["epochs"]
    assert Run.open(tmp_path / "a").digest == Run.open(tmp_path / "b").digest
    assert "greater than or equal to 0" in call(*words, "--remember", -1).stderr


def test_list_names_everything() -> None:
    entries = json.loads(call("list", "--json").stdout)
    assert set(entries) == {"data", "models", "defences", "attacks", "launchers", "victims", "suites"}
    assert {"name", "spec", "about"} == set(entries["defences"][0])
    assert all(entry["about"] for rows in entries.values() for entry in rows)
    text = call("list", "attacks").stdout
    assert "SoftLabels(once=False, T=4.0, alpha=0.9)" in text
    assert "Nasty" not in text
    refused(call("list", "attack"), "did you mean 'attacks'")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": "ConvNext"}, "did you mean 'ConvNet'"),
        ({"--model": "ConvNet(depth=3)"}, "No field of ConvNet named 'depth'"),
        ({"--model": "ConvNet(width=0)"}, "width = 0 is refused"),
        ({"--data": "digit"}, "did you mean 'Digits'"),
        ({"--data": "missing/folder"}, "no file or folder missing/folder"),
        ({"--data": "Digits(tset=0.2)"}, "did you mean 'test'"),
        ({"--set": "recipe.lr"}, "has no value"),
        ({"--set": "recipe.lr=fast"}, "lr = 'fast' is refused"),
        ({"--set": "recipe.lr=.nan"}, "lr = nan is refused"),
        ({"--set": "recipe.rate=1"}, "No field of Recipe named 'rate'"),
        ({"--set": "sead=1"}, "did you mean 'seed'"),
        ({"--set": "recipe=["}, "not readable YAML"),
        ({"--device": "meta"}, "Device 'meta' cannot be used"),
        ({"--config": "absent.yaml"}, "absent.yaml: No such file"),
        ({"--device": "gpu"}, "Device 'gpu' cannot be used"),
        ({"--weights": "absent.safetensors"}, "no weights file absent.safetensors"),
        ({"--model": "absent.py:make"}, "There is no file absent.py"),
    ],
)
def test_bad_words_for_train(change: dict[str, str], said: str, toy_file: Path, tmp_path: Path) -> None:
    words = {"--data": str(toy_file), "--model": TEACHER, "--out": str(tmp_path / "run")} | change
    refused(call("train", *(part for pair in words.items() for part in pair)), said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("defence", "said"),
    [
        ("Nasti", "did you mean 'Nasty'"),
        ("Nasty(omega=-1)", "omega = -1 is refused"),
        ("Nasty(omega=nan)", "Cannot read 'Nasty(omega=nan)'"),
        ("Nasty(temperature=4)", "No field of Nasty named 'temperature'"),
        ("Nasty(adversary='nowhere')", "There is no run folder nowhere"),
    ],
)
def test_bad_words_for_protect(defence: str, said: str, honest: Run, tmp_path: Path) -> None:
    refused(call("protect", honest.folder, "--defence", defence, "--out", tmp_path / "v"), said)
    assert not (tmp_path / "v" / "run.json").exists()


def test_default_audit_trains_students_as_the_honest_teacher_was(honest: Run, tmp_path: Path) -> None:
    out = tmp_path / "v"
    assert call("protect", honest.folder, "--defence", NASTY, "--out", out, "--set", "recipe.epochs=1").exit_code == 0
    assert call("audit", out, "--student", STUDENT, "--seeds", 1).exit_code == 0
    report = Report.model_validate_json((tmp_path / "v-audit" / "report.json").read_text())
    assert "epochs=6" in report.recipe


def test_bad_folders(honest: Run, victim: Run, tmp_path: Path) -> None:
    refused(call("protect", tmp_path / "no", "--defence", NASTY), "There is no run folder")
    refused(call("audit", honest.folder), "name it with --honest")
    refused(call("report", tmp_path), "writes one")
    out = call("protect", honest.folder, "--defence", NASTY, "--out", honest.folder)
    refused(out, "holds another run")
    refused(call("audit", victim.folder, "--suite", "quik", "--out", tmp_path / "a"), "did you mean 'quick-2'")
    refused(call("audit", victim.folder, "--out", victim.folder), "holds another run")


def test_bad_users_network(toy_file: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ndef five(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 5))\n"
        "def none(num_classes): return None\n"
    )
    base = ["train", "--data", toy_file, "--out", tmp_path / "run", "--model"]
    refused(call(*base, f"{tmp_path / 'net.py'}:five"), "for 3 classes it must return logits of shape (2, 3)")
    refused(call(*base, f"{tmp_path / 'net.py'}:none"), "must return a torch.nn.Module")
    refused(call(*base, f"{tmp_path / 'net.py'}:fife"), "did you mean 'five'")


def test_unreadable_settings_files(toy_file: Path, tmp_path: Path) -> None:
    base = ["train", "--data", toy_file, "--model", TEACHER, "--out", tmp_path / "run", "--config"]
    for content, said in ((b"1: 2\n", "must go by name"), (b"seed: \xff\xfe", "is not UTF-8")):
        (tmp_path / "settings.yaml").write_bytes(content)
        refused(call(*base, tmp_path / "settings.yaml"), said)


def test_pickled_weights_are_refused(toy_file: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    words = ["train", "--data", toy_file, "--model", TEACHER, "--out", tmp_path / "run"]
    refused(call(*words, "--weights", tmp_path / "module.pt"), "no plain state dict")


def test_bad_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", images=toy_arrays()["images"] / 255.0, labels=toy_arrays()["labels"])
    refused(call("train", "--data", tmp_path / "bad.npz", "--model", TEACHER, "--out", tmp_path / "r"), "must be uint8")
    (tmp_path / "photos" / "only").mkdir(parents=True)
    refused(call("train", "--data", tmp_path / "photos", "--model", TEACHER, "--out", tmp_path / "r"), "1 class folder")


def test_a_full_disk_loses_nothing(toy_file: Path, tmp_path: Path) -> None:
    """The system refuses to write more than 4 kB into any file, as a full disk would."""
    words = ["train", "--data", str(toy_file), "--model", "ConvNet(width=8)", "--out", str(tmp_path / "run"), *SET]
    command = [sys.executable, "-m", "undistill", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    full = subprocess.run(command, preexec_fn=limit, env=environment, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert "File too large" in full.stderr
    assert "run the same command again" in full.stderr
    assert not list((tmp_path / "run").glob("*.part"))
    assert not (tmp_path / "run" / "run.json").exists()
    mended = call(*words)
    assert mended.exit_code == 0, mended.stderr
    assert Run.open(tmp_path / "run").network()


def test_whoever_reads_may_stop() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "undistill", "list"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_data_check_shows_counts_and_a_sheet(toy_file: Path, tmp_path: Path) -> None:
    done = call("data", "check", toy_file, "--out", tmp_path / "new" / "sheet.png")
    assert done.exit_code == 0, done.stderr
    assert "toy: 3 classes, images 1 x 12 x 12" in done.stdout
    assert "test: 24 images, 8 to 8 a class" in done.stdout
    assert (tmp_path / "new" / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert call("data", "check", toy_file, "--out", tmp_path / "new").exit_code == 0
    assert (tmp_path / "new" / "toy-samples.png").exists()
    for written, meant in {
        "CIFAR11": "CIFAR10",
        "CIFAR-10": "CIFAR10",
        "Fashion-MNIST(seed=1)": "FashionMNIST",
    }.items():
        refused(call("data", "check", written), f"did you mean '{meant}'")


def test_data_check_fails_for_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "counts", ((4,) * 10, (2,) * 10))
    write_idx(tmp_path / "mnist", MNIST)
    done = call("data", "check", "MNIST(validation=0.25)", "--data-dir", tmp_path, "--out", tmp_path / "sheet.png")
    assert done.exit_code == 1
    assert "other bytes than published" in done.stdout
    assert (tmp_path / "sheet.png").exists()


def test_a_lack_of_memory_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undistill.data.digits.Digits.read", lambda _: bytearray(1 << 62))
    refused(call("data", "check", "digits"), "too little memory")
    monkeypatch.setattr("undistill.data.digits.Digits.read", lambda _: torch.empty(1 << 62, dtype=torch.uint8))
    refused(call("data", "check", "digits"), "too little memory")
    monkeypatch.setattr("undistill.data.digits.Digits.read", lambda _: torch.empty(2) @ torch.empty(3))
    assert isinstance(call("data", "check", "digits").exception, RuntimeError), "another fault is no lack of memory"


def test_the_data_folder_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDISTILL_DATA", "elsewhere")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").touch()
    done = call("data", "check", "CIFAR10", "--data-dir", tmp_path)
    refused(done, f"CIFAR10 in {tmp_path / 'cifar-10-batches-py'} (data_batch_1 ...) is partial")


def test_unknown_experiments_and_scales_are_explained(tmp_path: Path) -> None:
    assert "table1" in call("reproduce").stdout
    refused(call("reproduce", "tabel1", "--out", tmp_path / "a"), "did you mean 'table1'")
    refused(call("reproduce", "table1", "--scale", "papr", "--out", tmp_path / "a"), "did you mean 'paper'")
    refused(call("reproduce", "table1", "--cells", "*CNM", "--out", tmp_path / "a"), "No value named '*CNM'")
    assert not (tmp_path / "a").exists()
