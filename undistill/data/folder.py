"""A folder of images, one sub-folder for each class."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import ImageColor
from pydantic import Field, field_validator

from undistill.core.errors import DataError, legible, remark
from undistill.data.files import ImageFiles, entries, files_below
from undistill.data.pictures import MAX_PIXELS, Header, Reading, Shaping, is_beside, read_header, read_picture
from undistill.data.source import ResolvedPath, Source
from undistill.data.split import Parts, Samples

LARGE = 2 * 2**30  # bytes of pixels that are still held in memory
NAMED = 10  # files that a message names at most

R = TypeVar("R")

_PART = re.compile(
    r"(?:(?P<train>train|training)|(?P<validation>val|valid|validation|dev)|(?P<test>test|testing|eval|holdout))"
    r"[ _-]?(?:set|data|images)?",
    re.IGNORECASE,
)


class Folder(Source):
    """`path/CLASS/*.png`, or `path/train/CLASS/...` with `path/test/CLASS/...`, `path/val/CLASS/...` or both.

    Images are PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF. Folders of parts may be called training, valid, testing and the
    like; of train and val alone, val holds the test images.
    """

    quiet = ("shaping", "background", "max_pixels", "nested")

    path: ResolvedPath
    size: int | None = Field(None, ge=4, le=4096)
    """Bring every image to size x size pixels (needed where sizes differ), see `shaping`."""
    stream: bool | None = None
    """Read images from their files whenever they are needed; None does so above 2 GiB of pixels."""
    shaping: Shaping = "squash"
    """How `size` treats an image that is not square: squash it, crop its middle, or pad it with `background`."""
    background: str = "white"
    """Colour behind transparent images and beside padded ones: a name, or #rrggbb."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Pixels of the largest image that is read."""
    nested: bool = False
    """Whether folders within class folders are no classes, whatever they are called: all below is of that class."""

    @field_validator("background")
    @classmethod
    def _is_colour(cls, text: str) -> str:
        if len(ImageColor.getrgb(text)) > 3:
            raise ValueError("it must be opaque")
        return text

    @property
    def title(self) -> str:
        return Path(self.path).name

    def read(self) -> Parts:
        root = Path(self.path)
        if not root.is_dir():
            raise DataError(f"There is no folder {root}.")
        parts = self._parts(root)
        listed = {name: self._listed(folder) for name, folder in parts.items()}
        classes = self._classes(parts, listed)
        shape = self._shape({parts[name]: files for name, files in listed.items()})
        samples = {name: self._samples(files, classes, shape) for name, files in listed.items()}
        return Parts(samples["train"], classes, samples.get("validation"), samples.get("test"))

    def _parts(self, root: Path) -> dict[str, Path]:
        """The folders of train, validation and test images; the whole is train where there are no such folders."""
        folders = self._folders(root)
        found = {folder: match for folder in folders if (match := _PART.fullmatch(folder.name)) and self._holds(folder)}
        if self.nested or not found:
            return {"train": root}
        names = ", ".join(folder.name for folder in found)
        if others := [folder.name for folder in folders if folder not in found]:
            raise DataError(
                f"{root} holds {names}, which are named like parts of a data set, but also {', '.join(others[:5])}. "
                f"Move these away; or, if all are classes, say so: --data \"Folder(path='{root}', nested=True)\"."
            )
        parts: dict[str, Path] = {}
        for folder, match in found.items():
            name = str(match.lastgroup)
            if name in parts:
                raise DataError(
                    f"{root} holds both {parts[name].name} and {folder.name}, which mean the same; keep one."
                )
            parts[name] = folder
        if "train" not in parts:
            raise DataError(f"{root} holds {names}, but no folder train with images to train on; add it.")
        if "test" not in parts and "validation" in parts:
            parts["test"] = parts.pop("validation")
            remark(f"{root}: {parts['test'].name} holds the test images; validation images are taken from train.")
        return parts

    def _holds(self, folder: Path) -> bool:
        """Whether `folder` holds folders, as a part of a data set does, and hardly any images beside them."""
        found = entries(folder, Path(self.path))
        images = [entry for entry in found if not entry.is_dir() and not is_beside(Path(entry.path))]
        return sum(entry.is_dir() for entry in found) > len(images)

    def _folders(self, folder: Path) -> list[Path]:
        return [Path(entry.path) for entry in entries(folder, Path(self.path)) if entry.is_dir()]

    def _listed(self, root: Path) -> dict[str, list["_Image"]]:
        """The images of each class below `root`, by class."""
        folders = self._folders(root)
        if not self.nested:
            self._refuse_groups(root, folders)
        named = {file: folder.name for folder in folders for file in files_below(folder, Path(self.path))}
        headers = _each(named, lambda file: _header(file, self.reading), root)
        beside = [file for file, header in headers.items() if header is None]
        if beside:
            names = ", ".join(dict.fromkeys(legible(file.name) for file in beside[:3]))
            remark(f"{root}: {len(beside):,} files that are no images are passed over ({names} ...).")
        classes: dict[str, list[_Image]] = {folder.name: [] for folder in folders}
        for file, header in headers.items():
            if header is not None:
                classes[named[file]].append(_Image(file, header))
        return classes

    def _refuse_groups(self, root: Path, folders: Sequence[Path]) -> None:
        """Refuse class folders that seem to be groups of classes, or to hold parts of the data."""
        within = {folder: [inner.name for inner in self._folders(folder)] for folder in folders if self._holds(folder)}
        several = {folder: names for folder, names in within.items() if len(names) > 1}
        if not several:
            return
        folder, names = next(iter(several.items()))
        parts = all(_PART.fullmatch(name) for name in names)
        if not parts and (len(within) < len(folders) or len({frozenset(names) for names in within.values()}) == 1):
            return
        what = "parts of a data set" if parts else "classes"
        raise DataError(
            f"{folder} holds {', '.join(names[:5])}, which seem to be {what} themselves. Images are expected as "
            f"FOLDER/CLASS/IMAGE, or FOLDER/train/CLASS/IMAGE: move them; or, if all are images of "
            f"{folder.name}, say so: --data \"Folder(path='{root}', nested=True)\"."
        )

    def _classes(self, parts: dict[str, Path], listed: dict[str, dict[str, list["_Image"]]]) -> list[str]:
        """Class names by label: those of train, in which the others' must be."""
        train = listed["train"]
        if len(train) < 2:
            raise DataError(
                f"{parts['train']} has {len(train)} class folder{'s' * (len(train) != 1)}; images are expected "
                "as FOLDER/CLASS/IMAGE, with at least two classes."
            )
        if empty := [name for name, images in train.items() if not images]:
            raise DataError(f"The class folder {parts['train'] / empty[0]} is empty, or holds no image.")
        for name, found in listed.items():
            if not any(found.values()):
                raise DataError(f"{parts[name]} holds no images; add some, or remove it.")
        classes = sorted(train)
        if all(re.fullmatch(r"[0-9]+", name) for name in classes):
            numeric = sorted(classes, key=int)
            if numeric != classes:
                remark(
                    f"{parts['train']}: class folders are numbers, taken in numeric order: {', '.join(numeric[:3])} ..."
                )
            classes = numeric
        for name in listed:
            if extra := sorted(listed[name].keys() - set(classes)):
                raise DataError(
                    f"{parts[name]} has the class {extra[0]}{f' and {len(extra) - 1} more' * (len(extra) > 1)}, "
                    f"of which {parts['train'].name} has no images; both must have the same classes."
                )
        return classes

    def _shape(self, listed: dict[Path, dict[str, list["_Image"]]]) -> tuple[int, int, int]:
        """Channels, height and width to which images are read."""
        headers = {part: [one.header for images in found.values() for one in images] for part, found in listed.items()}
        everywhere = [header for found in headers.values() for header in found]
        if transparent := sum(header.is_transparent for header in everywhere):
            remark(f"{self.path}: {transparent:,} images have transparent parts, laid on {self.background}.")
        grey = all(one.is_grey and (self.reading.is_grey or not one.is_transparent) for one in everywhere)
        width, height = (self.size, self.size) if self.size else self._common_size(headers)
        return (1 if grey else 3), height, width

    def _common_size(self, headers: dict[Path, list[Header]]) -> tuple[int, int]:
        sizes = Counter(header.size for found in headers.values() for header in found)
        if len(sizes) == 1:
            return next(iter(sizes))
        root = min(headers, key=lambda part: len({header.size for header in headers[part]}) == 1)
        found = ", ".join(f"{w} x {h} ({n} images)" for (w, h), n in sizes.most_common(3))
        raise DataError(
            f"{root} mixes image sizes: {found}. Resize them, or let Folder do it: "
            f"--data \"Folder(path='{self.path}', size={sizes.most_common(1)[0][0][0]})\", which "
            "squashes those that are not square unless shaping='crop' or shaping='pad' is added."
        )

    def _samples(
        self, listed: dict[str, list["_Image"]], classes: Sequence[str], shape: tuple[int, int, int]
    ) -> Samples:
        found = [(image.file, label) for label, name in enumerate(classes) for image in listed.get(name, ())]
        files, labels = [file for file, _ in found], torch.tensor([label for _, label in found])
        channels, height, width = shape
        if math.prod((len(files), *shape)) > LARGE if self.stream is None else self.stream:
            return Samples(ImageFiles(files, (len(files), *shape), self.reading), labels)
        pixels = _each(files, lambda file: read_picture(file, channels, (width, height), self.reading), Path(self.path))
        return Samples(torch.stack([pixels[file] for file in files]), labels)

    @property
    def reading(self) -> Reading:
        return Reading(self.shaping, self.background, self.max_pixels)


@dataclass(frozen=True)
class _Image:
    file: Path
    header: Header


def _header(file: Path, reading: Reading) -> Header | None:
    """None for a file that lies beside images and is none."""
    try:
        return read_header(file, reading)
    except DataError:
        if is_beside(file):
            return None
        raise


def _each(files: Iterable[Path], deed: Callable[[Path], R], root: Path) -> dict[Path, R]:
    """The result of every file; one `DataError` names the first of those for which there is none, and how many."""
    done: dict[Path, R] = {}
    errors = []
    for file in files:
        try:
            done[file] = deed(file)
        except DataError as error:
            errors.append(str(error))
    if len(errors) == 1:
        raise DataError(errors[0])
    if errors:
        more = f"\n... and {len(errors) - NAMED:,} more" if len(errors) > NAMED else ""
        raise DataError(f"{root}: {len(errors):,} files cannot be used.\n" + "\n".join(errors[:NAMED]) + more)
    return done
