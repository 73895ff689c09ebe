"""Data of strangers that is partial, damaged, of another data set, or made to do harm: named, and not used."""

import contextlib
import gzip
import hashlib
import io
import struct
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from tests.conftest import toy_arrays
from tests.test_official import RANDOM, dump, small, write_cifar10, write_idx, write_svhn
from undistill.core.errors import DataError
from undistill.core.tensors import read_arrays
from undistill.data import CIFAR10, CIFAR100, KMNIST, MNIST, SVHN, FashionMNIST, Official, Source, TinyImageNet
from undistill.data.official import VARIABLE, File
from undistill.data.pictures import read_picture


def test_partial_and_foreign_folders_are_named_and_not_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, CIFAR10, 100, 20)
    folder = root / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "data_batch_3").rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"CIFAR10 in .* is partial: it lacks data_batch_3"):
        CIFAR10().load()
    (folder / "data_batch_3").write_bytes((folder / "elsewhere").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"data_batch_3 is not used: .*(ends too early|unexpected end of data)"):
        CIFAR10().load()
    (folder / "data_batch_3").unlink()
    (folder / "data_batch_3").mkdir()
    with pytest.raises(IsADirectoryError):  # the machine's own error, which the command line shows
        CIFAR10().load()
    (folder / "data_batch_3").rmdir()
    write_cifar10(folder, rows=21)
    with pytest.raises(DataError, match=r"105 training images, the published data set 100.*Remove that folder"):
        CIFAR10().load()


def test_other_numbers_of_a_class_are_another_data_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as training images in the place of the test images, or one data set packed anew as another."""
    small(monkeypatch, CIFAR10, 100, 20)
    folder = root / "cifar-10-batches-py"
    write_cifar10(folder)
    labels = [0, *range(9), *range(10)]
    dump(folder / "test_batch", {b"data": RANDOM.integers(0, 256, (20, 3072), np.uint8), b"labels": labels})
    with pytest.raises(DataError, match=r"3 test images of class class0, the published data set 2: .*Remove"):
        CIFAR10().load()
    dump(folder / "batches.meta", {b"label_names": [b"a", b"b"]})
    with pytest.raises(DataError, match="holds 2 classes, the published data set 10"):
        CIFAR10().load()


@pytest.mark.parametrize(
    ("source", "train", "test"),
    [(CIFAR10, 50_000, 10_000), (CIFAR100, 50_000, 10_000), (TinyImageNet, 100_000, 10_000), (SVHN, 73_257, 26_032)]
    + [(source, 60_000, 10_000) for source in (MNIST, FashionMNIST, KMNIST)],
)
def test_published_classes_add_up_to_the_published_totals(source: type[Official], train: int, test: int) -> None:
    assert tuple(map(sum, source.counts)) == (train, test)


def test_published_classes_are_in_the_order_of_their_labels() -> None:
    """Where they differ: MNIST's ones are most and its fives fewest; SVHN's ones most, nines fewest in training."""
    assert [[part.index(most(part)) for most in (max, min)] for part in MNIST.counts] == [[1, 5], [1, 5]]
    assert [[part.index(most(part)) for most in (max, min)] for part in SVHN.counts] == [[1, 9], [1, 9]]
    assert (MNIST.counts[1][4], MNIST.counts[0][9], SVHN.counts[0][0], SVHN.counts[1][2]) == (982, 5949, 4948, 4149)


def test_a_small_file_that_holds_too_much_is_not_unpacked_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, MNIST, 40, 20)
    write_idx(root / "mnist", MNIST)
    path = root / "mnist" / MNIST.files[3].name
    content = gzip.compress(struct.pack(">HBBI", 0, 8, 1, 1 << 27) + bytes(1 << 27))
    assert len(content) < 1 << 18
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz is damaged.*more than 47,040,016 bytes"):
        MNIST().load()
    assert tracemalloc.get_traced_memory()[1] < len(bytes(1 << 27))
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"X": np.zeros((32, 32, 3, 40), np.uint8), "y": np.ones((9000, 1), np.uint8)}, "y .9000"),
        ({"X": np.zeros((32, 32, 3, 40)), "y": np.ones((40, 1), np.uint8)}, "not one of bytes"),
        ({"X": np.array([[np.zeros(9000)]], object), "y": np.ones((1, 1), np.uint8)}, "not one of bytes"),
        ({"X": np.zeros((32, 32, 3, 40), np.uint8)}, "KeyError: 'y'"),
        ({"X": np.zeros((32, 32, 3, 40), np.uint8), "y": "text"}, "not one of bytes"),
        ({"X": np.zeros((32, 32, 3, 40), np.int8), "y": np.ones((40, 1), np.uint8)}, "not one of bytes"),
    ],
    ids=["labels", "type", "cell", "missing", "text", "signed"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_an_svhn_that_holds_something_else_is_named(
    packed: bool, arrays: dict[str, np.ndarray], said: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, SVHN, 40, 20)
    write_svhn(root)
    savemat(root / "train_32x32.mat", arrays, do_compression=packed)
    with pytest.raises(DataError, match=rf"train_32x32.mat is damaged.*{said}"):
        SVHN().load()


def test_an_svhn_that_unpacks_to_gigabytes_is_not_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, SVHN, 40, 20)
    write_svhn(root)
    arrays = {"X": np.zeros((32, 32, 3, 30_000), np.uint8), "y": np.ones((30_000, 1), np.uint8)}
    savemat(root / "train_32x32.mat", arrays, do_compression=True)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"train_32x32.mat is damaged.*larger than 1,171,456 bytes"):
        SVHN().load()
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_no_changed_byte_of_an_svhn_crashes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scipy's reader uses a byte of the file as an unchecked index into a table."""
    small(monkeypatch, SVHN, 40, 20)
    write_svhn(root)
    path = root / "train_32x32.mat"
    whole = path.read_bytes()
    pixels = whole.index(b"X") + 64
    for at in [*range(124, pixels), *range(len(whole) - 120, len(whole) - 40)]:
        for value in (0, 1, 100, 255):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(DataError):
                SVHN().load()


def test_a_truncated_idx_file_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, MNIST, 40, 20)
    write_idx(root / "mnist", MNIST)
    path = root / "mnist" / MNIST.files[2].name
    whole = gzip.decompress(path.read_bytes())
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    other_type = gzip.compress(b"\0\0\x0d\x03" + whole[4:])
    for content in (path.read_bytes()[:-20], gzip.compress(whole[:-5]), other_type, bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz is damaged.*Remove it"):
            MNIST().load()


def test_files_of_another_data_set_under_the_same_names_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (MNIST, KMNIST):
        small(monkeypatch, source, 40, 20)
    write_idx(root / "mnist", MNIST)
    labels = KMNIST.files[1].name
    digest = hashlib.md5((root / "mnist" / labels).read_bytes()).hexdigest()
    monkeypatch.setattr(KMNIST, "files", (KMNIST.files[0], File(labels, digest), *KMNIST.files[2:]))
    with pytest.raises(DataError, match=rf"{labels} is a file of KMNIST, not of MNIST.*not used.*Remove"):
        MNIST().load()


@pytest.mark.parametrize("content", [b"", b"no matlab file", b"\x89HDF" * 40], ids=["empty", "text", "newer"])
def test_a_damaged_svhn_names_the_file(content: bytes, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, SVHN, 40, 20)
    write_svhn(root)
    (root / "test_32x32.mat").write_bytes(content)
    with pytest.raises(DataError, match=r"/test_32x32.mat is damaged.*Remove it"):
        SVHN().load()


@pytest.mark.parametrize(("source", "write"), [(CIFAR10, write_cifar10), (MNIST, lambda root: write_idx(root, MNIST))])
def test_who_names_the_data_sets_own_folder_is_told_which_one_to_name(
    source: type[Official], write: Callable[[Path], object], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / source.folders[0]
    write(folder)
    monkeypatch.setenv(VARIABLE, str(folder))
    with pytest.raises(
        DataError,
        match=rf"{folder.name} itself holds files named like those of {source.__name__}.*in which {folder.name}",
    ):
        source().load()
    assert not (folder / folder.name).exists()


def doubled(times: int) -> list[Any]:
    """A list of two lists of two lists: copied wherever it is named, 2 to the power of `times` values."""
    value: list[Any] = []
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize("labels", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_labels_may_be_packed_in_several_ways(labels: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, CIFAR10, 100, 20)
    write_cifar10(root / "cifar-10-batches-py")
    content = {b"data": RANDOM.integers(0, 256, (20, 3072), np.uint8), b"labels": labels([k % 10 for k in range(20)])}
    dump(root / "cifar-10-batches-py" / "test_batch", content)
    assert CIFAR10(validation=0.2).load().test.labels.tolist() == [k % 10 for k in range(20)]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("test_batch", {b"data": doubled(60), b"labels": [0, 1]}),
        ("test_batch", {b"data": np.zeros((2, 3072), np.uint8), b"labels": doubled(60)}),
        ("test_batch", {b"data": np.zeros((1, 3072), np.uint8), b"labels": [1.5]}),
        ("batches.meta", {b"label_names": doubled(60)}),
        ("batches.meta", {b"label_names": b"cat"}),
        ("batches.meta", {b"label_names": [b"cat", b"\x1b[31mdog"]}),
    ],
)
def test_what_is_no_batch_is_named(file: str, content: object, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, CIFAR10, 100, 20)
    write_cifar10(root / "cifar-10-batches-py")
    dump(root / "cifar-10-batches-py" / file, content)
    with pytest.raises(DataError, match=rf"{file} is damaged.*Remove that folder"):
        CIFAR10().load()


def test_a_lack_of_memory_is_not_blamed_on_the_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, MNIST, 40, 20)
    write_idx(root / "mnist", MNIST)
    monkeypatch.setattr("undistill.data.idx.read_idx", lambda path: bytearray(1 << 62))
    with pytest.raises(MemoryError):
        MNIST().load()


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


def test_files_beside_the_arrays_of_an_archive_are_passed_over(tmp_path: Path) -> None:
    arrays = toy_arrays(per_class=20)
    np.savez(tmp_path / "x.npz", **arrays, meta=np.array({"a": 1}, object))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("README.txt", "hello")
    assert len(Source.parse(str(tmp_path / "x.npz")).load().train)
