import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import toy_arrays
from undistill.core.errors import DataError, SpecError
from undistill.data import Data, Digits, Folder, Npz, Samples, Source

SHARES = {"validation": 0.25, "test": 0.25, "count": 60, "seed": 5}


def save_folder(root: Path, arrays: dict[str, np.ndarray]) -> Path:
    for number, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return root


def rows(samples: Samples) -> set[bytes]:
    return {image.numpy().tobytes() for image in samples.images}


def test_digits_are_complete_and_divided() -> None:
    data = Digits().load()
    assert data.shape == (1, 8, 8)
    assert data.num_classes == 10
    assert sum(map(len, (data.train, data.validation, data.test))) == 1797
    assert len(data.test) == 599
    assert int(data.train.images.max()) == 255


def test_parts_are_disjoint_stratified_and_chosen_by_seed(toy_file: Path) -> None:
    data, again, other = (Npz(path=str(toy_file), seed=seed).load() for seed in (0, 0, 1))
    assert not rows(data.train) & rows(data.validation)
    assert not (rows(data.train) | rows(data.validation)) & rows(data.test)
    assert data.digest == again.digest != other.digest
    assert rows(data.test) != rows(other.test)
    for part in (data.train, data.validation, data.test):
        counts = torch.bincount(part.labels, minlength=3)
        assert counts.max() - counts.min() <= 1


def test_attackers_see_training_images_only(toy: Data) -> None:
    split = toy.attackers(0.1, 5)
    assert rows(split.train) | rows(split.validation) == rows(toy.train)
    assert not rows(split.train) & rows(split.validation)
    assert not hasattr(split, "test")


@pytest.mark.parametrize("layout", ["NHW", "NHW1", "N1HW", "NHW3", "N3HW"])
def test_npz_layouts(tmp_path: Path, layout: str) -> None:
    grey = toy_arrays()["images"]
    images = {
        "NHW": grey,
        "NHW1": grey[..., None],
        "N1HW": grey[:, None],
        "NHW3": np.stack([grey] * 3, 3),
        "N3HW": np.stack([grey] * 3, 1),
    }[layout]
    np.savez(tmp_path / "d.npz", images=images, labels=toy_arrays()["labels"])
    data = Source.parse(str(tmp_path / "d.npz")).load()
    assert data.shape == (3 if "3" in layout else 1, 12, 12)
    assert rows(data.train) | rows(data.validation) | rows(data.test) == {
        np.stack([image] * data.shape[0]).tobytes() for image in grey
    }


def test_npz_with_its_own_test_images(tmp_path: Path) -> None:
    train, test = toy_arrays(seed=0), toy_arrays(per_class=10, seed=1)
    path = tmp_path / "d.npz"
    np.savez(
        path, x_train=train["images"], y_train=train["labels"], x_test=test["images"], y_test=test["labels"],
        classes=np.array(["ant", "bee", "cat"]),
    )  # fmt: skip
    data = Npz(path=str(path)).load()
    assert data.classes == ("ant", "bee", "cat")
    assert rows(data.test) == {image.tobytes() for image in test["images"]}
    with pytest.raises(DataError, match="has its own test images"):
        Npz(path=str(path), test=0.5).load()


def bad_npz(name: str) -> dict[str, object]:
    good = toy_arrays()
    images, labels = good["images"], good["labels"]
    return {
        "float images": {"images": images / 255, "labels": labels},
        "flat images": {"images": images.reshape(len(images), -1), "labels": labels},
        "five channels": {"images": np.stack([images] * 5, 3), "labels": labels},
        "no images": {"images": images[:0], "labels": labels[:0]},
        "float labels": {"images": images, "labels": labels.astype(float)},
        "one-hot labels": {"images": images, "labels": np.eye(3)[labels].astype(int)},
        "too few labels": {"images": images, "labels": labels[:-1]},
        "negative label": {"images": images, "labels": labels - 1},
        "label out of range": {"images": images, "labels": labels, "classes": np.array(["a", "b"])},
        "huge label": {"images": images, "labels": labels + 300_000_000},
        "a gap in the labels": {"images": images, "labels": labels * 2},
        "one class": {"images": images, "labels": labels * 0},
        "one image of a class": {"images": images[39:], "labels": labels[39:]},
        "wrong names": {"pictures": images, "labels": labels},
        "unlisted classes": {"images": images, "labels": labels, "classes": np.array("abc")},
        "objects": {"images": images, "labels": np.array([None] * len(labels), dtype=object)},
    }[name]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("float images", "must be uint8"),
        ("flat images", "images must be (N, H, W)"),
        ("five channels", "1 or 3 channels"),
        ("no images", "images must be (N, H, W)"),
        ("float labels", "whole numbers"),
        ("one-hot labels", "whole numbers"),
        ("too few labels", "one for each image"),
        ("negative label", "Labels run from -1 to 1"),
        ("label out of range", "with 2 classes they must lie in 0 to 1"),
        ("huge label", "label 300000002 is out of range"),
        ("a gap in the labels", "No image of class 1"),
        ("one class", "at least two classes"),
        ("one image of a class", "Class 0 has a single image from which test images could be taken"),
        ("wrong names", "it needs images and labels"),
        ("unlisted classes", "must list one name per class"),
        ("objects", "it needs images and labels"),
    ],
)
def test_bad_npz_is_explained(tmp_path: Path, name: str, said: str) -> None:
    np.savez(tmp_path / "bad.npz", **bad_npz(name), allow_pickle=True)
    with pytest.raises(DataError, match=re.escape(said)):
        Npz(path=str(tmp_path / "bad.npz")).load()


def test_what_is_no_npz_is_explained(tmp_path: Path, toy_file: Path) -> None:
    """In our words: numpy's recommend to load it with pickle."""
    for content in (toy_file.read_bytes()[:3000], b"{}", b"", b"\0" + toy_file.read_bytes()):
        (tmp_path / "half.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"not a readable \.npz archive of plain arrays: it is none, or"):
            Npz(path=str(tmp_path / "half.npz")).load()


def test_count_leaves_out_an_image_of_each_class_or_none() -> None:
    with pytest.raises(DataError, match=r"count=1195 keeps 1195 of 1198 images.*ask for 10 to 1188"):
        Digits(count=1195).load()
    assert len(Digits(count=1188).load().train) + len(Digits(count=1188).load().validation) == 1188


def test_folder_is_read_like_the_arrays(tmp_path: Path) -> None:
    arrays = toy_arrays()
    data = Source.parse(str(save_folder(tmp_path / "photos", arrays))).load()
    assert isinstance(Source.parse(str(tmp_path / "photos")), Folder)
    assert data.classes == ("class0", "class1", "class2")
    assert rows(data.train) | rows(data.validation) | rows(data.test) == {i.tobytes() for i in arrays["images"]}


def test_a_path_may_hold_parentheses(tmp_path: Path) -> None:
    root = save_folder(tmp_path / "photos (1)", toy_arrays())
    assert len(Source.parse(str(root)).load().classes) == 3


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    save_folder(tmp_path / "train", toy_arrays(seed=0))
    save_folder(tmp_path / "test", toy_arrays(per_class=5, seed=1))
    assert len(Folder(path=str(tmp_path)).load().test) == 15
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="but also other"):
        Folder(path=str(tmp_path)).load()


def test_colour_images_make_the_folder_colour(tmp_path: Path) -> None:
    root = save_folder(tmp_path / "photos", toy_arrays())
    Image.new("RGBA", (12, 12), (200, 10, 10, 255)).save(root / "class0" / "red.png")
    assert Folder(path=str(root)).load().shape == (3, 12, 12)


def test_bad_folders_are_explained(tmp_path: Path) -> None:
    root = save_folder(tmp_path / "photos", toy_arrays())

    def refused(said: str) -> None:
        with pytest.raises(DataError, match=said):
            Folder(path=str(root)).load()

    (root / "class0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    refused("broken.png is not a readable image")
    (root / "class0" / "broken.png").unlink()

    Image.new("L", (20, 14)).save(root / "class1" / "large.png")
    refused(r"mixes image sizes: 12 x 12 \(120 images\), 20 x 14 \(1 images\).*size=12")
    assert Folder(path=str(root), size=8).load().shape == (1, 8, 8)
    (root / "class1" / "large.png").unlink()

    Image.new("I;16", (12, 12)).save(root / "class1" / "deep.png")
    refused("convert it to 8-bit")
    (root / "class1" / "deep.png").unlink()

    (root / "class3").mkdir()
    refused("class3 is empty")
    with pytest.raises(DataError, match="has 0 class folders"):
        Folder(path=str(root / "class0")).load()


def test_one_class_folder_is_explained(tmp_path: Path) -> None:
    root = save_folder(tmp_path / "photos", toy_arrays(classes=1))
    with pytest.raises(DataError, match="has 1 class folder;"):
        Folder(path=str(root)).load()


def test_missing_path_is_explained() -> None:
    with pytest.raises(DataError, match="no file or folder"):
        Source.parse("no/such/photos")


@pytest.mark.parametrize(
    ("source", "field", "value"),
    [
        *((name, field, value) for name in ("Digits", "Npz", "Folder") for field, value in SHARES.items()),
        ("Npz", "path", "other.npz"),
        ("Folder", "path", "other"),
        ("Folder", "size", 10),
        ("Folder", "stream", True),
    ],
)
def test_every_field_of_a_source_changes_the_data(source: str, field: str, value: object, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        np.savez(tmp_path / f"{name}.npz", **toy_arrays(seed=seed))
        save_folder(tmp_path / name, toy_arrays(seed=seed))
    path = {"Digits": {}, "Npz": {"path": str(tmp_path / "one.npz")}, "Folder": {"path": str(tmp_path / "one")}}[source]
    value = 600 if (source, field) == ("Digits", "count") else value
    change = {field: str(tmp_path / str(value)) if field == "path" else value}
    reader = Source.registry[source]
    assert reader(**path).load().digest != reader(**(path | change)).load().digest


def test_every_field_of_every_source_is_tried() -> None:
    folder = {"path", "size", "stream", "shaping", "background", "max_pixels", "nested"}  # see test_folders.py
    apart = {"of", "test_on"}  # see test_adopt.py
    own = {"Digits": set(), "Npz": {"path", "max_bytes"}, "Folder": folder, "Apart": apart}
    for name, source in Source.registry.items():
        if name == "Leaky":  # which refuses all but the seed
            continue
        assert set(source.model_fields) == set(SHARES) | own.get(name, set())


def test_leaky_shows_the_test_images_to_whoever_chooses(toy_file: Path) -> None:
    plain, leaky = Npz(path=str(toy_file), seed=3).load(), Source.parse(f"Leaky(of={str(toy_file)!r}, seed=3)").load()
    assert rows(leaky.validation) == rows(leaky.test) == rows(plain.test)
    assert rows(leaky.train) == rows(plain.train), "nothing but the selection differs"
    for share in (1.0, 0.5):
        split, as_else = (data.attackers(0.1, 0, share) for data in (leaky, plain))
        assert rows(split.validation) == rows(plain.test)
        assert rows(split.train) == rows(as_else.train)
    with pytest.raises(SpecError, match="belong to the source in 'of'"):
        Source.parse(f"Leaky(of={str(toy_file)!r}, count=50)")
    with pytest.raises(SpecError, match="seed belongs to Leaky"):
        Source.parse("Leaky(of='Digits(seed=5)')")


def test_images_are_held_and_hashed_once_on_each_device(toy: Data) -> None:
    """However many students ask for them, with labels or without."""
    there = torch.device("meta")
    samples = Samples(toy.train.pixels, toy.train.labels)
    moved = samples.to(there)
    assert moved.images.device == there
    assert samples.to(there) is moved
    hidden = samples.unlabelled
    assert hidden.to(there).images is moved.images
    assert hidden.to(there).labels.device == there
    assert moved.image_digest == hidden.to(there).image_digest == samples.image_digest
    assert hidden.digest != samples.digest
