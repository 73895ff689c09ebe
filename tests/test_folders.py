"""Folders of images as people have them: each kind is read as its owner means it, or refused with what to do."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from undistill.core.errors import DataError, SpecError, remark
from undistill.data import Data, Folder, Npz, Source
from undistill.data.files import ImageFiles

CLASSES = ("cat", "dog", "eel")
UPRIGHT = np.zeros((16, 16, 3), np.uint8)
UPRIGHT[:8] = 255


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Log of what is said of the data, anew in every test."""
    remark.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def fill(folder: Path, count: int = 12, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng([seed, *folder.name.encode()])
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def tree(root: Path, *parts: str, count: int = 12) -> Path:
    for seed, part in enumerate(parts):
        for name in CLASSES:
            fill(root / part / name, count, seed)
    return root


def sizes(data: Data) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


@pytest.mark.parametrize(
    ("parts", "read"),
    [
        (("train", "val"), (32, 4, 36)),
        (("train", "valid"), (32, 4, 36)),
        (("train", "validation"), (32, 4, 36)),
        (("training", "testing"), (32, 4, 36)),
        (("Train", "Test"), (32, 4, 36)),
        (("train_set", "test_set"), (32, 4, 36)),
        (("train-images", "test-images"), (32, 4, 36)),
        (("train", "test", "dev"), (36, 36, 36)),
        (("train",), (25, 3, 8)),
        ((".",), (25, 3, 8)),
    ],
    ids=str,
)
def test_folders_that_are_named_after_parts(parts: tuple[str, ...], read: tuple[int, int, int], tmp_path: Path) -> None:
    data = Source.parse(str(tree(tmp_path, *parts))).load()
    assert data.classes == CLASSES
    assert sizes(data) == read


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (("train", "val", "labels"), "train, val, which are named like parts of a data set, but also labels"),
        (("animals", "plants"), None),
        (("train", "val", "valid"), "both val and valid, which mean the same"),
        (("val", "test"), "but no folder train with images to train on"),
    ],
    ids=str,
)
def test_trees_that_mean_two_things(parts: tuple[str, ...], why: str | None, tmp_path: Path) -> None:
    tree(tmp_path, *parts)
    if why is None:  # groups of classes with other names
        shutil.rmtree(tmp_path / "plants" / "eel")
        why = r"animals holds cat, dog, eel, which seem to be classes themselves.*nested=True"
    with pytest.raises(DataError, match=why):
        Folder(path=str(tmp_path)).load()
    nested = Folder(path=str(tmp_path), nested=True).load()
    assert nested.classes == tuple(sorted(parts))


def test_parts_within_classes_are_refused(tmp_path: Path) -> None:
    for name in CLASSES:
        tree(tmp_path / name, "train", "test")
    with pytest.raises(DataError, match=r"which seem to be parts of a data set themselves"):
        Folder(path=str(tmp_path)).load()


def test_folders_within_classes_that_are_no_classes_are_read(tmp_path: Path) -> None:
    for name in CLASSES:
        fill(tmp_path / name / "2023", 10, 0)
        fill(tmp_path / name / "2024", 10, hash(name) % 1000)
    assert Folder(path=str(tmp_path)).load().classes == CLASSES


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train", "test"):
        fill(tmp_path / name)
    assert Folder(path=str(tmp_path)).load().classes == ("bus", "test", "train")


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".thumbnails", ".git/annex/objects", "@eaDir", "__MACOSX"])
def test_folders_of_the_system_are_passed_over(hidden: str, tmp_path: Path) -> None:
    root = tree(tmp_path, ".", count=20)
    shutil.copytree(root / "cat", root / "dog" / hidden)
    shutil.copytree(root / "cat", root / hidden)
    data = Folder(path=str(root)).load()
    assert data.classes == CLASSES
    assert sum(sizes(data)) == 60


def test_a_stray_picture_beside_the_classes_of_parts_makes_no_classes_of_them(tmp_path: Path) -> None:
    root = tree(tmp_path, "train", "test")
    for part in ("train", "test"):
        Image.new("L", (8, 8)).save(root / part / "montage.png")
    assert Source.parse(str(root)).load().classes == ("cat", "dog", "eel")


def test_validation_images_that_are_test_images_are_none(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, "train", "test")
    shutil.copytree(root / "test", root / "val")
    data = Source.parse(str(root)).load()
    assert "all validation images are copies of test images; others are taken from train" in said.text
    assert len(data.validation) < len(data.train)


def test_a_part_without_images_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, "train")
    for name in ("cat", "dog", "eel"):
        (root / "test" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="test holds no images; add some, or remove it"):
        Source.parse(str(root)).load()


def test_copies_are_left_out_and_said(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path / "photos", "train", "test", count=20)
    for number in range(5):
        shutil.copy(root / "test" / "cat" / f"{number}.png", root / "train" / "cat" / f"copy {number}.png")
        shutil.copy(root / "train" / "dog" / f"{number}.png", root / "train" / "eel" / f"other {number}.png")
    data = Folder(path=str(root)).load()
    assert sizes(data) == (60 - 6, 6, 60)
    assert "photos: 10 images are copies of others, 5 of them in another class; they are left out" in said.text
    streamed = Folder(path=str(root), stream=True).load()
    assert torch.equal(streamed.train.pixels, data.train.pixels)


def test_copies_are_found_where_only_training_images_stay_in_their_files(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("undistill.data.folder.LARGE", 50 * 3 * 8 * 8)  # bytes of pixels; test has 36 images
    root = tree(tmp_path / "photos", "train", count=20)
    for name in CLASSES:
        fill(root / "test" / name, seed=1)
    Image.open(root / "train" / "cat" / "0.png").save(root / "test" / "cat" / "copy.bmp")  # the same in another file
    data = Folder(path=str(root)).load()
    assert isinstance(data.train.images, ImageFiles)
    assert isinstance(data.test.images, torch.Tensor)
    assert len(data.train) + len(data.validation) == 60 - 1
    assert "1 images are copies of others" in said.text


def test_images_that_are_all_the_same_are_said(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "blank.npz", images=np.zeros((60, 8, 8), np.uint8), labels=np.arange(60) % 3)
    assert sum(sizes(Npz(path=str(tmp_path / "blank.npz")).load())) == 60
    assert "blank: all 60 images are the same; nothing can be learnt from them" in said.text


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_a_viewer_turns_them(kind: str, orientation: int, tmp_path: Path) -> None:
    scene = np.kron(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5, np.ones((4, 4), np.uint8))
    scene = np.stack([scene] * 3, 2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            exif = Image.Exif()
            exif[0x0112] = orientation
            picture = Image.fromarray(scene + number + 9 * (name == "b"))
            picture.save(tmp_path / name / f"{number}.{kind}", exif=exif)
    data = Folder(path=str(tmp_path), test=0.5, validation=0.5).load()
    with Image.open(tmp_path / "a" / "0.jpg" if kind == "jpg" else tmp_path / "a" / f"0.{kind}") as opened:
        shown = torch.from_numpy(np.array(ImageOps.exif_transpose(opened).convert("RGB"))).permute(2, 0, 1)
    images = torch.cat([part.pixels for part in (data.train, data.validation, data.test)])
    assert any(torch.equal(shown, image) for image in images)


def drawing(mode: str, x: int) -> Image.Image:
    """A black bar at `x` on a transparent ground."""
    alpha = np.zeros((16, 16), np.uint8)
    alpha[2:14, x : x + 2] = 255
    if mode == "P":
        picture = Image.fromarray((alpha > 0).astype(np.uint8))
        picture.putpalette([0] * 6)
        picture.info["transparency"] = bytes([0, 255])
        return picture
    layers = [Image.new("L", (16, 16))] * 3 + [Image.fromarray(alpha)]
    return Image.merge("RGBA", layers).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_drawings_are_laid_on_a_ground(mode: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    for name, start in (("a", 0), ("b", 7)):
        (tmp_path / name).mkdir()
        for x in range(start, start + 7):
            drawing(mode, x).save(tmp_path / name / f"{x}.png")
    pixels = Folder(path=str(tmp_path)).load().train.pixels
    assert pixels[0].shape[0] == (1 if mode == "LA" else 3)
    assert pixels.flatten(1).float().mean() > 200, "black on white"
    assert "14 images have transparent parts, laid on white" in said.text
    red = Folder(path=str(tmp_path), background="red").load().train.pixels
    assert red.float().mean((0, 2, 3)).tolist() == pytest.approx([red[:, 0].float().mean().item(), 0, 0])
    with pytest.raises(SpecError, match="background = 'rde' is refused"):
        Folder(path=str(tmp_path), background="rde")


def test_numbers_are_in_their_order(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    for number in range(12):
        fill(tmp_path / str(number), 6)
    assert Folder(path=str(tmp_path), validation=0.4, test=0.4).load().classes == tuple(map(str, range(12)))
    assert "taken in numeric order: 0, 1, 2 ..." in said.text


def test_a_class_without_test_images_is_named(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, "train", "test")
    shutil.rmtree(root / "test" / "dog")
    assert Folder(path=str(root)).load().classes == CLASSES
    assert "No test image of dog: nothing is measured on it" in said.text
    fill(root / "test" / "fox")
    with pytest.raises(DataError, match=r"test has the class fox, of which train has no images"):
        Folder(path=str(root)).load()


def test_rare_classes_are_named_with_a_value_that_works(tmp_path: Path) -> None:
    for number in range(20):
        fill(tmp_path / "many" / f"class {number:02d}", 4)
    with pytest.raises(
        DataError, match=r"test=0\.2 takes 16 of 80 .*ask for test=0\.25.*rarest class is class 00, with 4"
    ):
        Folder(path=str(tmp_path / "many")).load()
    with pytest.raises(DataError, match=r"validation=0\.1 takes 6 of 60 .*ask for validation=0\.34"):
        Folder(path=str(tmp_path / "many"), test=0.25).load()
    assert len(Folder(path=str(tmp_path / "many"), test=0.25, validation=0.34).load().validation) == 21
    tree(tmp_path / "one", ".")
    fill(tmp_path / "one" / "fox", 1)
    with pytest.raises(DataError, match="Class fox has a single image from which test images could be taken"):
        Folder(path=str(tmp_path / "one")).load()


def test_what_lies_beside_images_is_passed_over_and_counted(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, ".")
    (root / "cat" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(99))
    (root / "cat" / "notes.txt").write_text("übrig")
    (root / "dog" / "labels.csv").touch()
    assert sum(sizes(Folder(path=str(root)).load())) == 36
    assert "3 files that are no images are passed over (Thumbs.db, notes.txt, labels.csv ...)" in said.text
    (root / "dog" / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"page\.jpg is no readable image"):
        Folder(path=str(root)).load()
    (root / "dog" / "page.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(DataError, match=r"page\.jpg is a Git LFS pointer .*git lfs pull"):
        Folder(path=str(root)).load()


def test_all_bad_files_are_in_one_message(tmp_path: Path) -> None:
    root = tree(tmp_path, ".", count=20)
    for number in range(12):
        (root / "cat" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    with pytest.raises(DataError) as caught:
        Folder(path=str(root)).load()
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{root}: 12 files cannot be used."
    assert len(lines) == 12
    assert lines[-1] == "... and 2 more"


def test_large_images_can_be_allowed(tmp_path: Path) -> None:
    root = tree(tmp_path, ".")
    with pytest.raises(DataError, match=r"36 files cannot be used(.|\n)*has 8 x 8 pixels, more than 63"):
        Folder(path=str(root), max_pixels=63).load()
    assert Folder(path=str(root), max_pixels=64).load().shape == (3, 8, 8)
    (root / "cat" / "poster.png").unlink(missing_ok=True)
    Image.new("1", (20_000, 10_000)).save(root / "cat" / "poster.png")
    data = Folder(path=str(root), max_pixels=200_000_000, size=8).load()
    assert sum(sizes(data)) == 37


@pytest.mark.parametrize(
    ("shaping", "first", "middle"),
    [("squash", 0, 0), ("crop", 0, 0), ("pad", 255, 0)],
)
def test_images_that_are_not_square(shaping: str, first: int, middle: int, tmp_path: Path) -> None:
    """Black, twice as wide as high, with a white left quarter."""
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :8] = 255
    for name in CLASSES:
        fill(tmp_path / name, size=(16, 32))
    Image.fromarray(picture).save(tmp_path / "cat" / "a.png")
    source = Folder(path=str(tmp_path), size=16, shaping=shaping)
    assert Source.parse(str(source)) == source
    (image,) = [
        image
        for part in ("train", "validation", "test")
        for image in getattr(source.load(), part).pixels
        if image[0, 8, 12] == 0 and (image[:, 8, 8:14] == 0).all()
    ]
    assert image[0, 0, 8] == first
    assert image[0, 8, 8] == middle
    white_columns = int((image[0, 8] > 200).sum())
    assert white_columns == {"squash": 4, "crop": 0, "pad": 4}[shaping]


def test_texts_of_stored_runs_stay_as_they_were(tmp_path: Path) -> None:
    assert str(Folder(path=str(tmp_path))).endswith("size=None, stream=None)")


def test_streaming_needs_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have 64 MB of /dev/shm; workers that send images through it hang, or die by SIGBUS."""
    import torch.multiprocessing.reductions as reductions

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was sent to another process")

    for name in ("reduce_tensor", "reduce_storage"):
        monkeypatch.setattr(reductions, name, refuse)
    data = Folder(path=str(tree(tmp_path, ".")), stream=True).load()
    from undistill.data.files import fetched

    read = list(fetched(data.train.images, data.train.images.__getitem__, data.train.parts(4)))
    assert torch.equal(torch.cat(read), data.train.pixels)
