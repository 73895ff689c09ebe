"""Readers of public data, on small files in the formats that their authors publish."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from undistill.core.errors import DataError
from undistill.data import CIFAR10, CIFAR100, KMNIST, MNIST, SVHN, FashionMNIST, Official, Source, TinyImageNet
from undistill.data.check import check
from undistill.data.official import VARIABLE, File

RANDOM = np.random.default_rng(0)


def small(monkeypatch: pytest.MonkeyPatch, source: type[Official], train: int, test: int, classes: int = 10) -> None:
    """As if so many images had been published, as many of each class."""
    monkeypatch.setattr(source, "counts", tuple((count // classes,) * classes for count in (train, test)))


def batch(rows: int, label: str, classes: int) -> dict[bytes, Any]:
    """As Python 2 pickled it: names are bytes, labels a list, images rows of 3072."""
    labels = [int(value) for value in np.arange(rows) % classes]
    return {b"data": RANDOM.integers(0, 256, (rows, 3072), np.uint8), label.encode(): labels, b"batch_label": b"one"}


def dump(path: Path, value: object, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))


def write_cifar10(folder: Path, rows: int = 20, protocol: int = 2) -> np.ndarray:
    batches = {name: batch(rows, "labels", 10) for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]}
    for name, content in batches.items():
        dump(folder / name, content, protocol)
    dump(folder / "batches.meta", {b"label_names": [f"class{k}".encode() for k in range(10)]})
    return batches["test_batch"][b"data"]


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def write_idx(folder: Path, source: type[Official], counts: tuple[int, int] = (40, 20)) -> None:
    folder.mkdir(parents=True)
    arrays = []
    for count in counts:
        arrays += [RANDOM.integers(0, 256, (count, 28, 28)), np.arange(count) % 10]
    for file, values in zip(source.files, arrays, strict=True):
        (folder / file.name).write_bytes(idx(values))


def write_svhn(folder: Path) -> np.ndarray:
    for file, count in zip(SVHN.files, (40, 20), strict=True):
        images = RANDOM.integers(0, 256, (32, 32, 3, count), np.uint8)
        savemat(folder / file.name, {"X": images, "y": (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]})
    return images


def write_tiny(folder: Path, per_class: int = 6) -> list[str]:
    ids = ["n01443537", "n01629819", "n01641577"]
    colours = {name: (90 * number, 0, 200) for number, name in enumerate(ids)}
    for name in ids:
        (folder / "train" / name / "images").mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (64, 64), colours[name]).save(folder / "train" / name / "images" / f"{name}_{number}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    rows = []
    for number in range(6):
        name = ids[number % 3]
        Image.new("RGB", (64, 64), colours[name]).save(folder / "val" / "images" / f"val_{number}.JPEG")
        rows.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("\n".join(reversed(ids)) + "\n")
    (folder / "words.txt").write_text("".join(f"{name}\tthing {name}\n" for name in ids))
    return ids


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_batches(root: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    small(monkeypatch, CIFAR10, 100, 20)
    test = write_cifar10(root / "cifar-10-batches-py", protocol=protocol)
    data = CIFAR10(validation=0.2).load()
    assert (data.shape, len(data.train), len(data.validation), len(data.test)) == ((3, 32, 32), 80, 20, 20)
    assert data.classes[:2] == ("class0", "class1")
    assert np.array_equal(data.test.pixels.flatten(1).numpy(), test)
    assert data.test.labels.tolist() == [k % 10 for k in range(20)]


def test_cifar_100_has_its_fine_labels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, CIFAR100, 300, 100, classes=100)
    folder = root / "cifar-100-python"
    for name, rows in (("train", 300), ("test", 100)):
        dump(folder / name, batch(rows, "fine_labels", 100) | {b"coarse_labels": [0] * rows})
    dump(folder / "meta", {b"fine_label_names": [f"f{k}".encode() for k in range(100)], b"coarse_label_names": [b"c"]})
    data = CIFAR100(validation=0.4).load()
    assert data.num_classes == 100
    assert data.classes[99] == "f99"


@pytest.mark.parametrize("source", [MNIST, FashionMNIST, KMNIST])
@pytest.mark.parametrize("place", [0, 1])
def test_idx_files_where_we_and_where_torchvision_put_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, source: type[Official], place: int
) -> None:
    small(monkeypatch, source, 40, 20)
    write_idx(root / source.folders[place], source)
    data = source(validation=0.25).load()
    assert (data.shape, len(data.train), len(data.test), data.num_classes) == ((1, 28, 28), 30, 20, 10)


def test_svhn_writes_zero_as_ten(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, SVHN, 40, 20)
    images = write_svhn(root)
    data = SVHN(validation=0.25).load()
    assert data.test.labels.tolist() == [(k + 1) % 10 for k in range(20)]
    assert np.array_equal(data.test.pixels[3].numpy(), images[:, :, :, 3].transpose(2, 0, 1))


def test_files_that_are_not_the_published_ones_are_named_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small(monkeypatch, MNIST, 40, 20)
    write_idx(root / "mnist", MNIST)
    first, *others = MNIST.files
    content = (root / "mnist" / first.name).read_bytes()
    monkeypatch.setattr(MNIST, "files", (File(first.name, hashlib.md5(content).hexdigest()), *others))
    for seed in (0, 1):
        MNIST(validation=0.25, seed=seed).load()
    (record,) = caplog.records
    assert first.name not in record.message.partition(": ")[2]
    assert all(file.name in record.message for file in others)
    assert "undistill data check MNIST" in record.message


def test_tiny_imagenet_reads_the_annotations(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    ids = write_tiny(root / "tiny-imagenet-200")
    data = TinyImageNet(validation=0.2).load()
    assert data.classes == tuple(f"thing {name}" for name in ids)
    assert data.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    red = data.test.pixels[:, 0].float().mean((1, 2))
    assert torch.allclose(red, 90.0 * data.test.labels, atol=4), "every image must have its own class's colour"


def test_images_of_another_size_are_none_of_tiny_imagenets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    write_tiny(root / "tiny-imagenet-200")
    Image.new("L", (300, 17)).save(root / "tiny-imagenet-200" / "val" / "images" / "val_3.JPEG")
    with pytest.raises(DataError, match=r"val_3\.JPEG has 300 x 17 pixels"):
        TinyImageNet().load()


@pytest.mark.parametrize("leftovers", [False, True])
def test_tiny_imagenet_sorted_by_class_is_read_too(
    leftovers: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    folder = root / "tiny-imagenet-200"
    ids = write_tiny(folder)
    for number, path in enumerate(sorted((folder / "val" / "images").iterdir())):
        (folder / "val" / ids[number % 3]).mkdir(exist_ok=True)
        path.rename(folder / "val" / ids[number % 3] / path.name)
    if not leftovers:
        (folder / "val" / "images").rmdir()
        (folder / "val" / "val_annotations.txt").unlink()
    assert sorted(TinyImageNet(validation=0.2).load().test.labels.tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("case", ["no list", "one class"])
def test_tiny_imagenet_whose_validation_images_make_one_class_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    folder = root / "tiny-imagenet-200"
    ids = write_tiny(folder)
    annotations = folder / "val" / "val_annotations.txt"
    if case == "no list":
        annotations.unlink()
    else:
        annotations.write_text("".join(f"val_{n}.JPEG\t{ids[0]}\n" for n in range(6)))
    with pytest.raises(DataError, match="does not say which class"):
        TinyImageNet().load()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("val_2.JPEG\tn00000001", "Line 6 of .* names val_2.JPEG again"),
        ("val_5.JPEG\tn99999999", "Line 6 of .* gives no class of wnids.txt"),
        ("val_5.JPEG", "Line 6 of .* gives no class of wnids.txt"),
        ("", "val_5.JPEG is in one of them alone"),
    ],
)
def test_tiny_imagenets_annotations_name_every_image_once(
    row: str, said: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    write_tiny(root / "tiny-imagenet-200")
    annotations = root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    *others, last = annotations.read_text().splitlines()
    annotations.write_text("\n".join([*others, last, ""]) + "\n")
    assert len(TinyImageNet(validation=0.2).load().test) == 6, "an empty line is none"
    annotations.write_text("\n".join([*others, row]))
    with pytest.raises(DataError, match=said):
        TinyImageNet().load()


def test_check_says_whether_files_are_the_published_ones(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, MNIST, 40, 20)
    write_idx(root / "mnist", MNIST)
    first = MNIST.files[0]
    md5 = hashlib.md5((root / "mnist" / first.name).read_bytes()).hexdigest()
    monkeypatch.setattr(MNIST, "files", (File(first.name, md5), *MNIST.files[1:]))
    found = check(MNIST(validation=0.25))
    assert found.files[first.name] == "as published"
    assert "other bytes" in found.files[MNIST.files[1].name]
    assert found.counts["train"].tolist() == [3] * 10
    white = (found.sheet(rows=2) == 255).flatten(1).all(1).view(2, -1)
    assert white.tolist() == [[False] * 3 + [True] * 5] * 2, "a row for each class, though it has three images only"


def test_check_says_where_no_hash_is_published(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    write_tiny(root / "tiny-imagenet-200")
    found = check(TinyImageNet(validation=0.2))
    assert found.files.keys() == {"wnids.txt", "words.txt", "train", "val"}
    assert all("only the archive" in state for state in found.files.values())


def test_count_takes_the_classes_in_their_proportions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, MNIST, 400, 20)
    write_idx(root / "mnist", MNIST, (400, 20))
    few, many = MNIST(count=100).load(), MNIST(count=1000).load()
    assert len(few.train) + len(few.validation) == 100
    assert len(many.train) + len(many.validation) == 400
    assert len(few.test) == 20
    assert torch.bincount(few.train.labels).tolist() == [9] * 10


@pytest.mark.real
@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST"])
def test_the_real_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means and first labels of the official files."""
    if "UNDISTILL_REAL_DATA" not in os.environ:
        pytest.skip("set UNDISTILL_REAL_DATA to the folder of the unpacked public data sets")
    monkeypatch.setenv(VARIABLE, os.environ["UNDISTILL_REAL_DATA"])
    source = Source.parse(name)
    parts = source.read()
    pool, test, classes = parts.train, parts.test, parts.classes
    mean = {"CIFAR10": (0.4914, 0.4822, 0.4465), "CIFAR100": (0.5071, 0.4865, 0.4409), "FashionMNIST": (0.2860,)}
    assert np.allclose(pool.pixels.double().mean((0, 2, 3)) / 255, mean[name], atol=2e-4)
    first = {"CIFAR10": "frog", "CIFAR100": "cattle", "FashionMNIST": "ankle boot"}
    assert classes[int(pool.labels[0])] == first[name]
    assert (len(pool), len(test)) == tuple(map(sum, source.counts))


@pytest.mark.parametrize("kept", [True, False])
def test_idx_files_may_lie_unpacked(kept: bool, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, MNIST, 100, 20)
    write_idx(root / "mnist", MNIST, (100, 20))
    before = MNIST().load().digest
    for file in MNIST.files:
        packed = root / "mnist" / file.name
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        if not kept:
            packed.unlink()
    assert MNIST().load().digest == before
    files = check(MNIST()).files
    assert ("train-images-idx3-ubyte" in files) != kept
