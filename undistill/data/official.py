"""Public data sets from the files that their authors publish: found where they lie, or downloaded and checked."""

import hashlib
import os
import shutil
import tarfile
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from filelock import FileLock

from undistill.core.errors import DataError, FileError, refused, remark
from undistill.core.files import GIB, fresh_name, inside, open_regular, sweep
from undistill.data.source import Source
from undistill.data.split import Parts, Samples

LARGEST = GIB  # of a published file
VARIABLE = "UNDISTILL_DATA"
AGAIN = "Remove {}, and what was published is downloaded again."


def data_dir() -> Path:
    """Folder of public data sets: `UNDISTILL_DATA` (or --data-dir), else the user's cache folder."""
    import pooch

    return Path(os.path.expanduser(os.environ.get(VARIABLE) or pooch.os_cache("undistill")))


@dataclass(frozen=True)
class File:
    """A published file, and the MD5 that its authors or torchvision state; empty where none is stated."""

    name: str
    md5: str = ""

    def matches(self, path: Path) -> bool:
        """Whether `path` holds the published bytes."""
        if path.stat().st_size > LARGEST:
            return False
        with open_regular(path) as file:
            return hashlib.file_digest(file, "md5").hexdigest() == self.md5


class Official(Source):
    """A data set with published training and test images."""

    published = True

    home: ClassVar[str]
    """The address of its files."""
    folders: ClassVar[Sequence[str]]
    """Folders in which the files may lie, below the data folder: ours first, then those of other tools."""
    files: ClassVar[Sequence[File]]
    """Files that are read."""
    archive: ClassVar[File | None] = None
    """Archive that is downloaded, if the files are published in one."""
    counts: ClassVar[tuple[Sequence[int], Sequence[int]]]
    """Published numbers of training and of test images, for each class."""

    def read(self) -> Parts:
        folder = self.find()
        with reading(self._what(folder), self._again):
            pool, test, classes = self.read_from(folder)
        for kind, samples, published in zip(("training", "test"), (pool, test), self.counts, strict=True):
            if differs := _difference(kind, samples, classes, published):
                raise DataError(f"{self._what(folder)} holds {differs}. {self._again}")
        self._remark(folder)
        return Parts(pool, classes, test=test)

    def _remark(self, folder: Path) -> None:
        """Say which files are others than published: repacked or damaged, which is told apart by looking."""
        others = [file.name for file in self.files if self.compare(folder, file) is False]
        if others:
            name = type(self).__name__
            remark(
                f"{name} in {folder}: other bytes than published in {', '.join(others)}. They are used, since form and "
                f"counts are right; look at them with 'undistill data check {name}'."
            )

    @abstractmethod
    def read_from(self, folder: Path) -> tuple[Samples, Samples, list[str]]:
        """Training images, test images and class names, from the files in `folder`."""

    def path(self, folder: Path, file: File) -> Path:
        """Where `file` lies in `folder`, or would lie."""
        return folder / file.name

    def compare(self, folder: Path, file: File) -> bool | None:
        """Whether `file` holds the published bytes; None where no hash of what lies there is published."""
        path = self.path(folder, file)
        return file.matches(path) if file.md5 and path.name == file.name else None

    def find(self) -> Path:
        """The folder in which the files lie; they are downloaded where there is none."""
        root = data_dir()
        self._require_inside(root)
        folder = self._folder(root)
        missing = self._missing(folder)
        if self.archive and 0 < len(missing) < len(self.files):
            others = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise DataError(f"{self._what(folder)} is partial: it lacks {missing[0].name}{others}. {self._again}")
        if missing:
            self._refuse_inside(root)
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):  # of several processes that find nothing, one fetches it
                self._fetch(root)
        self._require_inside(root)
        return self._folder(root)

    def _require_inside(self, root: Path) -> None:
        """`FileError` for a link in `root` by which we would read, or write, elsewhere."""
        for folder in self.folders:
            for file in self.files:
                inside(root, os.path.relpath(self.path(root / folder, file), root))

    def _folder(self, root: Path) -> Path:
        """Folder in which some of the files lie already, or else the folder to put them."""
        places = [root / folder for folder in self.folders]
        found = [place for place in places if any(self.path(place, file).exists() for file in self.files)]
        return (found or places)[0]

    def _refuse_inside(self, root: Path) -> None:
        """Refuse the data set's own folder as the data directory."""
        if not self._missing(root):
            places = " or ".join(name for name in self.folders if name)
            raise DataError(
                f"{root} itself holds files named like those of {type(self).__name__}; --data-dir and {VARIABLE} name "
                f"the folder in which {places} lies. Name that one, or move the files into {root / self.folders[0]}."
            )

    def _missing(self, folder: Path) -> list[File]:
        return [file for file in self.files if not self.path(folder, file).exists()]

    def _fetch(self, root: Path) -> None:
        """Whatever is missing by now."""
        folder = self._folder(root)
        missing = self._missing(folder)
        if missing and self.archive:
            _refuse_occupied(folder, self.archive)
            unpack(fetch(self.home, self.archive, root), root)
            return
        for file in missing:
            fetch(self.home, file, folder)

    @property
    def _again(self) -> str:
        return AGAIN.format("that folder" if self.archive else "those files")

    def _what(self, folder: Path) -> str:
        return f"{type(self).__name__} in {folder} ({self.files[0].name} ...)"


def _difference(kind: str, samples: Samples, classes: Sequence[str], published: Sequence[int]) -> str:
    """Difference from the published data set; empty if all classes have as many images."""
    if len(samples) != sum(published):
        return (
            f"{len(samples):,} {kind} images, the published data set {sum(published):,}: it is partial, or another one"
        )
    if len(classes) != len(published):
        return f"{len(classes)} classes, the published data set {len(published)}"
    for label, (name, count) in enumerate(zip(classes, published, strict=True)):
        if (found := int((samples.labels == label).sum())) != count:
            what = f"{found:,} {kind} images of class {name}, the published data set {count:,}"
            return f"{what}: it is another one, or damaged"
    return ""


@contextmanager
def reading(what: object, again: str = AGAIN.format("it")) -> Iterator[None]:
    """`DataError`, that says `what` is damaged and what to do, for whatever a reader raises."""
    try:
        yield
    except (DataError, FileError, MemoryError):
        raise
    except Exception as error:  # gzip, zlib, struct and pillow raise many kinds for damaged files
        if refused(error):
            raise
        raise DataError(
            f"{what} is damaged, or not the published one ({type(error).__name__}: {error}). {again}"
        ) from None


def fetch(home: str, file: File, folder: Path) -> Path:
    """The published file in `folder`, downloaded if it is not there; `DataError` where its bytes are others."""
    import pooch

    path, url = folder / file.name, f"{home}/{file.name}"
    if path.exists():
        if not file.matches(path):
            raise DataError(
                f"{path} is partial, damaged or another file: its MD5 is not the published {file.md5}. "
                f"It is not used. {AGAIN.format('it')}"
            )
        return path
    try:
        pooch.retrieve(url, f"md5:{file.md5}", file.name, folder, progressbar=True)
    except ValueError as error:
        raise DataError(f"What {url} delivers is not the published file ({error}); nothing of it was kept.") from None
    except OSError as error:
        if refused(error):
            raise
        raise DataError(
            f"{url} cannot be downloaded ({type(error).__name__}). Get it in another way and put it into {folder}, "
            f"or name the folder in which your data lies: --data-dir, or the variable {VARIABLE}."
        ) from None
    return path


def unpack(archive: Path, root: Path) -> None:
    """Unpack a tar or zip archive into `root`, whole or not at all; other files are left alone."""
    sweep(root)
    part = fresh_name(root)
    part.mkdir()
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(part)
        else:
            with tarfile.open(archive) as packed_tar:
                packed_tar.extractall(part, filter="data")
        for folder in part.iterdir():
            _refuse_occupied(root / folder.name, archive)
            folder.replace(root / folder.name)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}). {AGAIN.format('it')}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refuse_occupied(folder: Path, archive: File | Path) -> None:
    """An empty folder gives way to what is unpacked; anything else does not."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise DataError(f"{folder} is in the way of what {archive.name} holds; move it away.")
