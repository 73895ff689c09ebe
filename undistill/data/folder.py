"""A folder of images, one sub-folder for each class."""

import math
from collections import Counter
from pathlib import Path

import torch
from pydantic import Field

from undistill.data.files import GREY, ImageFiles, read_header, read_picture
from undistill.data.source import ResolvedPath, Source
from undistill.data.split import Samples
from undistill.errors import DataError

LARGE = 2 * 2**30  # bytes of pixels that are still held in memory


class Folder(Source):
    """`path/CLASS/*.png`, or `path/train/CLASS/...` and `path/test/CLASS/...`; any format Pillow reads."""

    path: ResolvedPath
    size: int | None = Field(None, ge=4, le=4096)
    """Resize every image to size x size pixels (needed where sizes differ)."""
    stream: bool | None = None
    """Read images from their files whenever they are needed; None does so above 2 GiB of pixels."""

    @property
    def title(self) -> str:
        return Path(self.path).name

    def read(self) -> tuple[Samples, Samples | None, list[str]]:
        root = Path(self.path)
        if not root.is_dir():
            raise DataError(f"There is no folder {root}.")
        names = {folder.name for folder in _folders(root)}
        if {"train", "test"} <= names:
            if extra := names - {"train", "test"}:
                raise DataError(f"{root} has train and test, but also {sorted(extra)}; move them away.")
            classes = [folder.name for folder in _folders(root / "train")]
            found = [folder.name for folder in _folders(root / "test")]
            if classes != found:
                raise DataError(f"{root}: train has the classes {classes}, test has {found}; they must agree.")
            return self._samples(root / "train", classes), self._samples(root / "test", classes), classes
        classes = sorted(names)
        return self._samples(root, classes), None, classes

    def _samples(self, root: Path, classes: list[str]) -> Samples:
        if len(classes) < 2:
            raise DataError(
                f"{root} has {len(classes)} class folder{'s' * (len(classes) != 1)}; images are expected "
                "as FOLDER/CLASS/IMAGE, with at least two classes."
            )
        found = [(file, label) for label, name in enumerate(classes) for file in _files(root / name)]
        files, labels = [file for file, _ in found], torch.tensor([label for _, label in found])
        headers = [read_header(file) for file in files]
        width, height = self._common_size(root, Counter(size for _, size in headers))
        channels = 1 if all(mode in GREY for mode, _ in headers) else 3
        shape = len(files), channels, height, width
        if math.prod(shape) > LARGE if self.stream is None else self.stream:
            return Samples(ImageFiles(files, shape), labels)
        return Samples(torch.stack([read_picture(file, channels, (width, height)) for file in files]), labels)

    def _common_size(self, root: Path, sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
        if self.size is not None:
            return self.size, self.size
        if len(sizes) > 1:
            found = ", ".join(f"{w} x {h} ({n} images)" for (w, h), n in sizes.most_common(3))
            raise DataError(
                f"{root} mixes image sizes: {found}. Resize them, or let Folder do it: "
                f"--data \"Folder(path='{self.path}', size={sizes.most_common(1)[0][0][0]})\"."
            )
        return next(iter(sizes))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise DataError(f"The class folder {folder} is empty.")
    return files
