"""A folder of images, one sub-folder for each class."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from undistill.data.source import ResolvedPath, Source
from undistill.data.split import Samples
from undistill.errors import DataError

_GREY = {"1", "L", "LA"}
_COLOUR = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"}


class Folder(Source):
    """`path/CLASS/*.png`, or `path/train/CLASS/...` and `path/test/CLASS/...`; any format Pillow reads."""

    path: ResolvedPath
    size: int | None = Field(None, ge=4, le=4096)
    """Resize every image to size x size pixels (needed where sizes differ)."""

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
        files = [(file, label) for label, name in enumerate(classes) for file in _files(root / name)]
        pictures = [self._open(file) for file, _ in files]
        shapes = Counter(picture.size for picture in pictures)
        if len(shapes) > 1:
            sizes = ", ".join(f"{w} x {h} ({n} images)" for (w, h), n in shapes.most_common(3))
            raise DataError(
                f"{root} mixes image sizes: {sizes}. Resize them, or let Folder do it: "
                f"--data \"Folder(path='{self.path}', size={shapes.most_common(1)[0][0][0]})\"."
            )
        mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
        pixels = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
        images = torch.from_numpy(pixels).reshape(len(pictures), *pixels.shape[1:3], -1)
        labels = torch.tensor([label for _, label in files])
        return Samples(images.permute(0, 3, 1, 2).contiguous(), labels)

    def _open(self, file: Path) -> Image.Image:
        try:
            with Image.open(file) as opened:
                if opened.mode not in _GREY | _COLOUR:
                    raise DataError(f"{file} has mode {opened.mode}; convert it to 8-bit grey or colour.")
                picture = opened.convert("L" if opened.mode in _GREY else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{file} is not a readable image ({error}); repair or remove it.") from None
        if self.size is None:
            return picture
        return picture.resize((self.size, self.size), Image.Resampling.BILINEAR)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise DataError(f"The class folder {folder} is empty.")
    return files
