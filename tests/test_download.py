"""Public data that is not there yet: fetched once, checked, unpacked whole or not at all."""

import errno
import hashlib
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.test_official import small, write_cifar10, write_idx, write_tiny
from undistill.core.errors import DataError
from undistill.data import CIFAR10, MNIST, SVHN, TinyImageNet
from undistill.data.official import File, unpack


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("server")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


@pytest.fixture
def published(root: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> File:
    """CIFAR-10, small, as an archive on the server."""
    small(monkeypatch, CIFAR10, 100, 20)
    address, folder = server
    write_cifar10(folder / "cifar-10-batches-py")
    with tarfile.open(folder / "c10.tar.gz", "w:gz") as packed:
        packed.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    archive = File("c10.tar.gz", hashlib.md5((folder / "c10.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "home", address)
    monkeypatch.setattr(CIFAR10, "archive", archive)
    return archive


@pytest.mark.usefixtures("published")
def test_what_is_not_there_is_downloaded_once(root: Path, server: tuple[str, Path]) -> None:
    assert len(CIFAR10().load().test) == 20
    (server[1] / "c10.tar.gz").unlink()
    assert len(CIFAR10().load().test) == 20
    assert not list(root.glob("*.part"))


def test_other_bytes_are_not_taken_for_the_published_file(
    root: Path, published: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "archive", File(published.name, "0" * 32))
    with pytest.raises(DataError, match="not the published file"):
        CIFAR10().load()
    assert not (root / "c10.tar.gz").exists()
    (root / "c10.tar.gz").write_bytes(b"half of it")
    with pytest.raises(DataError, match="partial, damaged or another file"):
        CIFAR10().load()
    assert (root / "c10.tar.gz").read_bytes() == b"half of it"


def test_an_interrupted_download_goes_on(root: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, MNIST, 40, 20)
    write_idx(server[1] / "files", MNIST)
    contents = {file.name: (server[1] / "files" / file.name).read_bytes() for file in MNIST.files}
    published = tuple(File(name, hashlib.md5(content).hexdigest()) for name, content in contents.items())
    monkeypatch.setattr(MNIST, "files", published)
    monkeypatch.setattr(MNIST, "home", f"{server[0]}/files")
    (root / "mnist").mkdir()
    (root / "mnist" / published[0].name).write_bytes(contents[published[0].name])
    assert len(MNIST(validation=0.25).load().train) == 30


@pytest.mark.usefixtures("published")
def test_what_is_in_the_way_of_an_archive_is_named(root: Path) -> None:
    (root / "cifar-10-batches-py").mkdir()
    (root / "cifar-10-batches-py" / "readme.html").touch()
    with pytest.raises(DataError, match="cifar-10-batches-py is in the way"):
        CIFAR10().load()
    assert [path.name for path in (root / "cifar-10-batches-py").iterdir()] == ["readme.html"]
    assert not (root / "c10.tar.gz").exists(), "nothing is downloaded in vain"


@pytest.mark.usefixtures("published")
def test_who_removed_the_files_and_left_the_folder_gets_them_again(root: Path) -> None:
    (root / "cifar-10-batches-py").mkdir()
    assert len(CIFAR10().load().test) == 20


@pytest.mark.usefixtures("published")
def test_processes_that_start_together_fetch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = []

    def slowly(archive: Path, folder: Path) -> None:
        unpacked.append(archive)
        time.sleep(0.3)
        unpack(archive, folder)

    monkeypatch.setattr("undistill.data.official.unpack", slowly)
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(lambda: len(CIFAR10().load().test)) for _ in range(3)]
        assert [one.result() for one in done] == [20, 20, 20]
    assert len(unpacked) == 1


def test_a_zip_is_unpacked(
    root: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small(monkeypatch, TinyImageNet, 18, 6, classes=3)
    made = tmp_path_factory.mktemp("tiny")
    write_tiny(made / "tiny-imagenet-200")
    packed = Path(shutil.make_archive(str(server[1] / "tiny"), "zip", made))
    monkeypatch.setattr(TinyImageNet, "home", server[0])
    monkeypatch.setattr(TinyImageNet, "archive", File("tiny.zip", hashlib.md5(packed.read_bytes()).hexdigest()))
    assert len(TinyImageNet(validation=0.2).load().test) == 6
    (root / "half.zip").write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"half\.zip cannot be unpacked"):
        unpack(root / "half.zip", root)


def test_an_unreachable_address_says_what_to_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SVHN, "home", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot be downloaded .*--data-dir"):
        SVHN().load()


def test_a_full_disk_is_not_blamed_on_the_address(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pooch.retrieve", full)
    with pytest.raises(OSError, match="No space left"):
        SVHN().load()


def test_an_archive_cannot_write_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "evil").write_text("x")
    with tarfile.open(tmp_path / "e.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "evil", "../../evil")
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "e.tar.gz", tmp_path / "root")
    assert not list((tmp_path / "root").iterdir())
