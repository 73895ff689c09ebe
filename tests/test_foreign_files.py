"""Folders and files of strangers: what is read is regular, limited and plain; nothing outside is touched."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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
from undistill.core.tensors import load_state, read_arrays
from undistill.data import Source, TinyImageNet
from undistill.data.pictures import read_picture
from undistill.models import Model, load_weights
from undistill.runs.run import Run
from undistill.runs.settings import recorded_settings

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


GOOD = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]


@pytest.mark.parametrize("kind", [*GOOD, *(["AVIF"] if "AVIF" in Image.SAVE else [])])
def test_usual_formats_are_read(kind: str, tmp_path: Path) -> None:
    Image.new("L", (16, 16), 100).save(tmp_path / "x.png", format=kind)
    assert read_picture(tmp_path / "x.png", 1, (16, 16)).float().mean() == pytest.approx(100, abs=2)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "PDF", "TGA"])
def test_other_formats_are_refused_and_start_no_program(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    if kind == "EPS":
        (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    else:
        Image.new("RGB", (16, 16)).save(tmp_path / "x.png", format=kind)
    with pytest.raises(DataError, match="is no readable image; PNG, JPEG"):
        read_picture(tmp_path / "x.png", 1, (16, 16))


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, format="PNG")
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"has 20,000 x 20,000 pixels, more than 89,478,485; .*max_pixels=400000000"):
        read_picture(tmp_path / "x.png", 1, (16, 16))


def test_archives_are_not_unpacked_beyond_their_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.zeros((1000, 32, 32), np.uint8), labels=np.arange(1000) % 3)
    assert len(Source.parse(f"Npz(path={str(path)!r}, max_bytes=1100000)").load().train)
    with pytest.raises(DataError, match=r"unpacks to 1,032,\d+ bytes; max_bytes is 1,000,000"):
        Source.parse(f"Npz(path={str(path)!r}, max_bytes=1000000)").load()


def member(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


HEADERS = {
    "no array": b"hello",
    "more than is there": member(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }\n", b"x"),
    "less than is there": member(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }\n", b"xy"),
    "nothing, very often": member(b"{'descr': '<U0', 'fortran_order': False, 'shape': (100000000000,), }\n"),
    "version": b"\x93NUMPY\x09\x00aaaa",
}


@pytest.mark.parametrize("what", HEADERS)
def test_members_that_lie_are_not_read(what: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", HEADERS[what])
    with pytest.raises(ValueError, match=r"."):
        read_arrays(tmp_path / "x.npz")


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
    from undistill.runs.settings import TrainSettings

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


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.jsonl"])
def test_huge_files_are_not_even_hashed(name: str, honest: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(honest.folder, tmp_path / "run"))
    os.truncate(run / name, 10**12)
    for command in (["protect", run, "--defence", NASTY, "--out", tmp_path / "out"], ["figure", "training", run]):
        if (name == "metrics.jsonl") == (command[0] == "figure"):
            assert call(*command).exit_code == 2


def test_numbers_that_whole_numbers_cannot_hold_are_refused(honest: Run, tmp_path: Path) -> None:
    state = weights()
    name = next(name for name in state if name.endswith("num_batches_tracked"))
    for value in (float("nan"), float("inf"), 0.5):
        torch.save(state | {name: torch.tensor(value)}, tmp_path / "x.pt")
        with pytest.raises(ModelError, match="not usable"):
            load_weights(Model.parse(STUDENT).build((1, 12, 12), 3, 0), tmp_path / "x.pt")


def test_files_beside_the_arrays_of_an_archive_are_passed_over(tmp_path: Path) -> None:
    arrays = toy_arrays(per_class=20)
    np.savez(tmp_path / "x.npz", **arrays, meta=np.array({"a": 1}, object))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("README.txt", "hello")
    assert len(Source.parse(str(tmp_path / "x.npz")).load().train)
