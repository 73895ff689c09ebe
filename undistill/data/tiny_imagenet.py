"""Tiny-ImageNet-200 (Stanford CS231N), whose validation images lie in one folder beside a list of their classes."""

from collections.abc import Sequence
from pathlib import Path

import torch

from undistill.core.errors import DataError
from undistill.core.files import inside, read_text
from undistill.data.files import files_below
from undistill.data.official import File, Official
from undistill.data.pictures import read_header, read_picture
from undistill.data.split import Samples

SIDE = 64


class TinyImageNet(Official):
    """110,000 photographs of 200 kinds of things, 64 x 64; the published validation images are the test images."""

    home = "http://cs231n.stanford.edu"
    folders = ("tiny-imagenet-200",)
    archive = File("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
    files = (File("wnids.txt"), File("words.txt"), File("train"), File("val"))
    counts = ((500,) * 200, (50,) * 200)

    def read_from(self, folder: Path) -> tuple[Samples, Samples, list[str]]:
        ids = sorted(read_text(folder / "wnids.txt").split())
        words = dict(line.split("\t", 1) for line in read_text(folder / "words.txt").splitlines())
        train = _sorted_by_folder(folder / "train", ids)
        return _samples(train, ids), _samples(validation_files(folder / "val", ids), ids), [words[name] for name in ids]


def validation_files(folder: Path, ids: Sequence[str]) -> list[tuple[Path, str]]:
    """Every image with its class: by `val_annotations.txt` as published, or sorted into one folder for each class.

    A folder of images whose classes are unknown, or all the same, is refused: read by folder, as many
    readers do, it would be a test set of one class.
    """
    annotations, images = inside(folder, "val_annotations.txt"), inside(folder, "images")
    if annotations.exists() and images.is_dir() and _images(images):
        found = _annotated(annotations, images, ids)
    else:
        found = _sorted_by_folder(folder, ids)
    if len({label for _, label in found}) < 2:
        raise DataError(
            f"{folder} does not say which class its images are of, or all are of one: as published it has images/ and "
            "val_annotations.txt. Restore that file, or sort the images into one folder for each class."
        )
    return found


def _annotated(annotations: Path, folder: Path, ids: Sequence[str]) -> list[tuple[Path, str]]:
    """Every image of `folder` with the class that a line of the list gives it."""
    labels = {}
    for number, line in enumerate(read_text(annotations).splitlines(), 1):
        if line.strip():
            name, label = (*line.split("\t"), "", "")[:2]
            if label not in ids or name in labels:
                why = f"names {name} again" if name in labels else f"gives no class of wnids.txt: {line!r}"
                raise DataError(f"Line {number} of {annotations} {why}. Restore that file from the archive.")
            labels[name] = label
    if unlike := labels.keys() ^ {file.name for file in _images(folder)}:
        raise DataError(
            f"{annotations} and {folder} do not name the same images: {min(unlike)} is in one of them alone, and "
            f"{len(unlike) - 1} more. Restore both from the archive."
        )
    return [(folder / name, label) for name, label in labels.items()]


def _sorted_by_folder(folder: Path, ids: Sequence[str]) -> list[tuple[Path, str]]:
    """Every image with its class, whose name is that of the folder in which it lies."""
    folders = {name: inside(folder, name) for name in ids}
    return [(file, name) for name, place in folders.items() if place.is_dir() for file in _images(place)]


def _images(folder: Path) -> list[Path]:
    return [file for file in files_below(folder, folder) if file.suffix == ".JPEG"]


def _samples(found: Sequence[tuple[Path, str]], ids: Sequence[str]) -> Samples:
    label = {name: number for number, name in enumerate(ids)}
    labels = torch.tensor([label[name] for _, name in found])
    pixels = torch.empty(len(found), 3, SIDE, SIDE, dtype=torch.uint8)
    for row, (file, _) in zip(pixels, found, strict=True):
        width, height = read_header(file).size
        if (width, height) != (SIDE, SIDE):
            raise DataError(f"{file} has {width} x {height} pixels, and is none of Tiny-ImageNet's: they are 64 x 64.")
        row.copy_(read_picture(file, 3, (SIDE, SIDE)))
    return Samples(pixels, labels)
