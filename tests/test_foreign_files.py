"""Folders and files of strangers: what is read is regular, limited and plain; nothing outside is touched."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import NASTY, STUDENT, TEACHER, toy_arrays
from tests.test_cli import call, refused
from tests.test_official import small, write_tiny
from undistill.api import audit
from undistill.cli.config import read_settings
from undistill.core import files
from undistill.core.errors import DataError, FileError, ModelError, NonFinite, SpecError, legible
from undistill.core.files import (
    inside,
    parse_json,
    read_json,
    seal,
    sweep,
    unseal,
    write_atomically,
    write_json,
    write_text,
)
from undistill.core.tensors import load_state
from undistill.data import Source, TinyImageNet
from undistill.data.pictures import read_picture
from undistill.models import Model, load_weights
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings, recorded_settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def audited(victim: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audited") / "audit"
    audit(victim, out, students=[STUDENT], seeds=1, device="cpu")
    return out


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's own, which nobody may touch."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("precious")
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


PLANTED = {
    "report.json": "file",
    "report.md": "file",
    "report.html": "file",
    "report.md.part": "file",
    "evidence.npz": "file",
    "run.json": "file",
    "request.json": "file",
    "metrics.jsonl": "file",
    "weights.safetensors": "file",
    "checkpoint-0.pt": "file",
    "students": "folder",
    "answers": "folder",
    "cells": "folder",
    "autotune": "folder",
    "cells/x": "folder",
    "cells/x.json": "file",
    "answers/k/00000.safetensors.part": "file",
    ".lock": "file",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_link_in_a_folder_is_named_and_what_it_names_left_alone(
    name: str, audited: Path, victim: Run, honest: Run, toy_file: Path, outside: Path, tmp_path: Path
) -> None:
    before = content(outside)
    copies = {kind: tmp_path / kind for kind in ("audit", "victim", "honest")}
    for folder, source in zip(copies.values(), (audited, victim.folder, honest.folder), strict=True):
        shutil.copytree(source, folder)
        planted = folder / name
        if planted.is_dir():
            shutil.rmtree(planted)
        planted.unlink(missing_ok=True)
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.symlink_to(outside / PLANTED[name])
    commands = [
        ["report", copies["audit"]],
        ["figure", "students", copies["audit"]],
        ["figure", "answers", copies["audit"]],
        ["audit", victim.folder, "--student", STUDENT, "--seeds", 1, "--out", copies["audit"]],
        ["audit", copies["victim"], "--honest", honest.folder, "--out", tmp_path / "new-audit"],
        ["protect", copies["honest"], "--defence", NASTY, "--out", tmp_path / "new-victim"],
        ["figure", "training", copies["honest"]],
        ["train", "--data", toy_file, "--model", TEACHER, "--out", copies["honest"]],
        ["protect", honest.folder, "--defence", NASTY, "--out", copies["victim"]],
    ]
    for command in commands:
        result = call(*command)
        assert result.exit_code == 2, (command, result.output)
        assert "is a link. Below" in result.stderr or "damaged" in result.stderr or "is no run" in result.stderr
    assert content(outside) == before
    for folder in copies.values():
        assert (folder / name).is_symlink()


def test_writing_does_not_follow_links(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").symlink_to(outside / "file")
    write_text(tmp_path / "report.md", "ours")
    assert (outside / "file").read_text() == "precious"
    assert (tmp_path / "report.md").read_text() == "ours"
    assert not (tmp_path / "report.md").is_symlink()


def test_what_a_killed_process_left_is_swept_under_the_lock(honest: Run, tmp_path: Path, toy_file: Path) -> None:
    killed: list[Path] = []

    def write(_: object) -> None:
        killed.extend(tmp_path.glob(".*.part"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", write)
    assert [files.PART.fullmatch(path.name) is not None for path in killed] == [True]
    assert not list(tmp_path.iterdir()), "an error leaves nothing; only a kill can"
    folder = Path(shutil.copytree(honest.folder, tmp_path / "run"))
    left = [folder / killed[0].name, folder / "cells" / killed[0].name]
    others = [folder / "answers" / killed[0].name, folder / "x.part"]
    for path in (*left, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    words = [f"--set=recipe.{field}" for field in ("epochs=6", "batch_size=16", "lr=0.1")]
    assert call("train", "--data", toy_file, "--model", TEACHER, "--out", folder, *words).exit_code == 0
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others), "what another process may be writing, or is no file of ours, stays"
    (tmp_path / killed[0].name).mkdir()
    sweep(tmp_path)
    assert not (tmp_path / killed[0].name).exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b", "..\\x", "link/x", "link"])
def test_names_that_lead_out_of_a_folder_are_refused(name: str, outside: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    with pytest.raises(FileError, match="leads out of"):
        inside(folder, name)
    assert inside(folder, "a/b") == folder / "a" / "b"


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


READERS: dict[str, Callable[[Path], object]] = {
    "JSON": lambda path: files.read_text(path),
    "hash": lambda path: files.sha256(path),
    "YAML": lambda path: read_settings(path, None, False),
    "npz": lambda path: Source.parse(f"Npz(path={str(path)!r})").load(),
    "picture": lambda path: read_picture(path, 1, (8, 8)),
    "weights": lambda path: load_weights(Model.parse(STUDENT).build((1, 8, 8), 3, 0), path),
    "state": lambda path: load_state(path, CPU),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_only_regular_files_are_read(reader: str, kind: str, tmp_path: Path) -> None:
    path = fifo(tmp_path / "x") if kind == "FIFO" else Path("/dev/zero")
    with pytest.raises((FileError, DataError, ModelError, ValueError)):
        READERS[reader](path)


def test_a_fifo_among_images_or_in_a_run_is_named(honest: Run, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    fifo(folder / "a" / "x.png")
    with pytest.raises(DataError, match=r"x\.png is neither file nor folder"):
        Source.parse(str(folder)).load()
    run = Path(shutil.copytree(honest.folder, tmp_path / "run"))
    fifo(run / "x")
    refused(call("protect", run, "--defence", NASTY), "is a FIFO. Below")


def photos(folder: Path, count: int = 20) -> Path:
    for label, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(toy_arrays(per_class=count)["images"][label * count : (label + 1) * count]):
            Image.fromarray(image).save(folder / name / f"{number:03}.png")
    return folder


def test_links_among_images_are_followed_inside_the_folder_alone(outside: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    count = len(Source.parse(str(folder)).load().train)
    (folder / "a" / "again.png").symlink_to("000.png")
    assert len(Source.parse(str(folder)).load().train) >= count
    for target, said in ((outside / "file", "leads out of"), ("nowhere", "a link to nothing"), (".", "to a folder")):
        (folder / "a" / "again.png").unlink()
        (folder / "a" / "again.png").symlink_to(target)
        with pytest.raises((DataError, FileError), match=said):
            Source.parse(str(folder)).load()
    (folder / "a" / "again.png").unlink()
    (folder / "c").symlink_to(folder / "a")
    with pytest.raises(DataError, match="c is a link to a folder"):
        Source.parse(str(folder)).load()


def test_public_data_is_read_and_written_inside_its_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("UNDISTILL_DATA", str(data))
    (data / "tiny-imagenet-200").symlink_to(elsewhere)
    with pytest.raises(FileError, match="leads out of"):
        TinyImageNet().load()
    assert not list(elsewhere.iterdir()), "nothing was downloaded into it"


def test_a_link_for_tiny_imagenets_annotations_is_refused(
    root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    write_tiny(root / "tiny-imagenet-200")
    annotations = root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    (outside / "file").rename(root.parent / "file")
    annotations.unlink()
    annotations.symlink_to(root.parent / "file")
    with pytest.raises(FileError, match="leads out of"):
        TinyImageNet().load()


def test_names_in_a_list_of_classes_stay_in_the_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    folder = root / "tiny-imagenet-200"
    ids = write_tiny(folder)
    for name in ("../../secret", "/etc", ".."):
        (folder / "wnids.txt").write_text("\n".join([*ids[:2], name]))
        with pytest.raises(FileError, match="leads out of"):
            TinyImageNet().load()


def test_json_holds_finite_numbers_alone(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"metrics\.nll\[1\] is nan, which is not written to .*x\.json"):
        write_json(tmp_path / "x.json", {"metrics": {"nll": [1.0, float("nan")]}})
    assert not (tmp_path / "x.json").exists()
    for text in ('{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
        (tmp_path / "x.json").write_text(text)
        assert read_json(tmp_path / "x.json") is None
    assert parse_json('{"a": 1e300, "b": -0.5}') == {"a": 1e300, "b": -0.5}


def test_a_seal_holds_for_what_it_was_made_for() -> None:
    record = {"b": 1.5, "a": [1, "x"]}
    assert unseal(seal(record)) == record
    assert unseal(seal(record) | {"b": 2.5}) is None
    assert unseal(record) is None
    assert unseal(seal(record, b"key"), b"key") == record
    assert unseal(seal(record), b"key") is None
    assert unseal(seal(record) | {"sha256": 5}) is None


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "alias or anchor"),
        ("seed: !!int '5'", "YAML tag"),
        ("seed: !!python/object/apply:os.system [exit]", "YAML tag"),
        ("[" * 2000, "levels deep"),
        ("recipe: {1: 2}", "must go by name"),
        ("? [a]\n: 1", "not readable YAML|must go by name"),
        ("seed: 0x" + "f" * 5000, "not readable YAML|is refused"),
        ("- 1", "must hold settings by name"),
        ("self: 1", "No field of"),
        ("x: " + "a" * 2**20, "at most 1,048,576 are read"),
    ],
)
def test_settings_are_plain_yaml(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises((SpecError, FileError), match=said) as error:
        TrainSettings(**read_settings(tmp_path / "x.yaml", None, False))
    assert len(str(error.value)) < 500


def test_what_terminals_and_pages_would_obey_is_shown(audited: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(audited, tmp_path / "audit"))
    report = json.loads((folder / "report.json").read_text())
    report["title"] = "x\ntouch /tmp/ran\n<script>alert(1)</script> [a](javascript:b) | `c`"
    report["verdict"]["sentence"] = "[/b] \x1b]52;c;x\x07 [red]"
    report["cells"][0]["attack"] = "[bold]Mine\x1b[2J(<b>)"
    (folder / "report.json").write_text(json.dumps(report))
    shown = call("report", folder)
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.stdout
    assert "\\x1b]52" in shown.stdout
    assert "[/b]" in shown.stdout
    markdown = (folder / "report.md").read_text()
    assert "<" not in markdown.replace("\\<", "")
    assert "\ntouch" not in markdown
    assert r"\[a\](javascript:b) \| \`c\`" in markdown
    html = (folder / "report.html").read_text()
    assert "<script" not in html
    assert "<b>)" not in html


def test_legible_text_is_left_alone_and_the_rest_escaped() -> None:
    assert legible("Zürich 日本 ± 5 %") == "Zürich 日本 ± 5 %"
    assert legible("a\x1b[0m\n\udce9\u202e") == r"a\x1b[0m\n\xe9\u202e"


def test_names_that_are_not_utf8_lose_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole run: folder, classes, outputs, pages and figures."""
    here = os.fsencode(tmp_path) + b"/caf\xe9"
    for label, name in enumerate((b"\xe9t\xe9", b"hiver")):
        os.makedirs(here + b"/photos/" + name)
        for number, image in enumerate(toy_arrays(per_class=20)["images"][label * 20 : label * 20 + 20]):
            Image.fromarray(image).save(here + b"/photos/" + name + b"/%03d.png" % number)
    monkeypatch.chdir(os.fsdecode(here))
    fast = ["--set", "recipe.epochs=1", "--set", "recipe.batch_size=8"]
    for command in (
        ["train", "--data", "photos", "--model", TEACHER, "--out", "h\udce9", *fast],
        ["protect", "h\udce9", "--defence", NASTY, "--out", "v\udce9"],
        ["audit", "v\udce9", "--student", STUDENT, "--seeds", 1, "--out", "a\udce9"],
        ["figure", "answers", "a\udce9"],
    ):
        result = call(*command)
        assert result.exit_code == 0, result.output
    assert "\\xe9t\\xe9" in Path("a\udce9/report.html").read_text()


def test_a_figure_of_a_table_follows_no_link_beside_it(outside: Path, tmp_path: Path) -> None:
    rows = [{"name": f"omega={n}: a", "measured": {"0": {"accuracy": 50.0}}} for n in (1, 2)]
    (tmp_path / "t.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "t").symlink_to(outside)
    before = content(outside)
    assert call("figure", "ablation", tmp_path / "t.json").exit_code == 0
    assert content(outside) == before
    assert (tmp_path / "t.svg").is_file()


def test_an_out_that_nobody_named_is_no_link(honest: Run, outside: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(honest.folder, tmp_path / "run"))
    (tmp_path / "run-nasty").symlink_to(outside)
    refused(call("protect", run, "--defence", NASTY), "run-nasty is a link; if its target is meant, name it with --out")


def test_a_matplotlibrc_of_a_stranger_changes_no_figure(audited: Path, tmp_path: Path) -> None:
    """It could have text set by LaTeX, an external program."""
    folder = Path(shutil.copytree(audited, tmp_path / "audit"))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    (tmp_path / "bin").mkdir()
    latex = tmp_path / "bin" / "latex"
    latex.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\nexit 1\n")
    latex.chmod(0o755)
    environment = os.environ | {"PATH": f"{latex.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "undistill", "report", str(folder)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "ran").exists()


def test_a_record_cannot_force_compilation(honest: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(honest.folder, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    record["settings"]["recipe"]["compute"]["compile"] = True
    (run / "run.json").write_text(json.dumps(record))
    assert recorded_settings(Run.open(run)).recipe.compute.compile == "auto"


@pytest.mark.parametrize(("field", "value"), [("classes", ["a", "b"]), ("shape", [3, 12, 12])])
def test_a_record_of_other_images_is_refused(field: str, value: object, honest: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(honest.folder, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {field: value}))
    refused(call("protect", run, "--defence", NASTY, "--out", tmp_path / "out"), "is for images")
