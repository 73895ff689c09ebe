"""A folder of images, one sub-folder for each class."""

import math
from collections import Counter
from pathlib import Path

import torch
from pydantic import Field

from undistill.core.errors import DataError
from undistill.data.files import GREY, ImageFiles, entries, files_below, read_header, read_picture
from undistill.data.source import ResolvedPath, Source
from undistill.data.split import Samples

LARGE = 2 * 2**30  # bytes of pixels that are still held in memory


class Folder(Source):
    """`path/CLASS/*.png`, or `path/train/CLASS/...` and `path/test/CLASS/...`.

    Images are PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF.
    """

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
        folders = _folders(root, root)
        names = {folder.name for folder in folders}
        if {"train", "test"} <= names:
            if extra := names - {"train", "test"}:
                raise DataError(f"{root} has train and test, but also {sorted(extra)}; move them away.")
            parts = [_folders(root / part, root) for part in ("train", "test")]
            train, test = ([folder.name for folder in part] for part in parts)
            if train != test:
                raise DataError(f"{root}: train has the classes {train}, test has {test}; they must agree.")
            return self._samples(root / "train", parts[0]), self._samples(root / "test", parts[1]), train
        return self._samples(root, folders), None, [folder.name for folder in folders]

    def _samples(self, root: Path, classes: list[Path]) -> Samples:
        if len(classes) < 2:
            raise DataError(
                f"{root} has {len(classes)} class folder{'s' * (len(classes) != 1)}; images are expected "
                "as FOLDER/CLASS/IMAGE, with at least two classes."
            )
        found = [(file, label) for label, folder in enumerate(classes) for file in _files(folder, Path(self.path))]
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


def _folders(folder: Path, root: Path) -> list[Path]:
    return [Path(entry.path) for entry in entries(folder, root) if entry.is_dir()]


def _files(folder: Path, root: Path) -> list[Path]:
    files = files_below(folder, root)
    if not files:
        raise DataError(f"The class folder {folder} is empty.")
    return files
