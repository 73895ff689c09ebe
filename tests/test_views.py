import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from undistill.core.errors import SpecError
from undistill.data import Samples
from undistill.data.batches import ViewDataset, grouped
from undistill.data.views import Views, draw, philox

EVERY = [
    Views(crop=0.25, flip=True),
    Views(rotate=20),
    Views(cutout=0.5),
    Views(mixup=1.0),
    Views(cutmix=1.0),
    Views(crop=0.25, flip=True, rotate=180, cutout=0.3, mixup=0.2),
]


def words(value: int) -> list[torch.Tensor]:
    return [torch.tensor([value])] * 4


def samples(count: int, channels: int = 3, height: int = 12, width: int = 10) -> Samples:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)
    return Samples(images, torch.arange(count) % 3)


def shown(views: Views, some: Samples, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return views(some, seed, epoch, torch.arange(len(some)), 3)[0]


def test_philox_gives_the_published_test_vectors() -> None:
    """Known answers of Random123 for philox4x32-10."""
    zeros = [int(w) for w in philox(words(0), (0, 0))]
    ones = [int(w) for w in philox(words(0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF))]
    assert zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("views", EVERY, ids=str)
def test_a_view_is_the_same_bits_in_every_batch_and_order(views: Views) -> None:
    some = samples(40)
    images, labels = views(some, 7, 3, torch.arange(40), 3)
    assert images.dtype == torch.uint8
    for size in (1, 7, 40):
        order = torch.randperm(40)
        parts = [views(some, 7, 3, part, 3) for part in order.split(size)]
        assert torch.equal(torch.cat([part for part, _ in parts]), images[order])
        assert torch.equal(torch.cat([part for _, part in parts]), labels[order])


@pytest.mark.parametrize("views", EVERY, ids=str)
def test_seed_and_epoch_change_every_kind_of_view(views: Views) -> None:
    some = samples(40)
    first = shown(views, some, 7, 3)
    for seed, epoch in ((8, 3), (7, 4), (7 + 2**32, 3)):
        assert not torch.equal(shown(views, some, seed, epoch), first)


def test_n_views_are_taken_in_turn() -> None:
    some, views = samples(20), Views(flip=True, n_views=3)
    seen = [shown(views, some, 0, epoch) for epoch in range(6)]
    assert all(torch.equal(seen[epoch], seen[epoch + 3]) for epoch in range(3))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], shown(Views(flip=True), some, 0, 1))


def test_crops_are_windows_of_the_padded_image_and_all_occur() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 8, 8)
    padded = torch.zeros(10, 10, dtype=torch.uint8)
    padded[1:9, 1:9] = image[0]
    windows = {tuple(padded[y : y + 8, x : x + 8].flatten().tolist()) for y in range(3) for x in range(3)}
    views = shown(Views(crop=0.125), Samples(image.expand(400, 1, 8, 8), torch.zeros(400, dtype=torch.long)))
    assert {tuple(view.flatten().tolist()) for view in views} == windows


def test_flip_mirrors_half_of_the_views() -> None:
    some = samples(600, 1, 4, 5)
    views = shown(Views(crop=0, flip=True), some)
    same = (views == some.images).flatten(1).all(1)
    mirrored = (views == some.images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 240 < mirrored.sum() < 360


def test_no_augmentation_is_the_image() -> None:
    some = samples(9)
    assert torch.equal(shown(Views(crop=0), some), some.images)


def test_rotation_turns_by_the_drawn_angle() -> None:
    """Against scipy-free arithmetic: nearest pixel of the turned coordinate, in floating point."""
    some, largest = samples(50, 1, 9, 9), 90.0
    views = shown(Views(crop=0, rotate=largest), some)
    drawn = draw(0, 0, torch.arange(50))[3] % 4096
    angles = np.deg2rad(np.linspace(-largest, largest, 4096))[drawn.numpy()]
    y, x = np.mgrid[:9, :9] - 4.0
    for view, image, angle in zip(views[:, 0].numpy(), some.images[:, 0].numpy(), angles, strict=True):
        source_y = np.floor(np.cos(angle) * y + np.sin(angle) * x + 4.5).astype(int)
        source_x = np.floor(np.cos(angle) * x - np.sin(angle) * y + 4.5).astype(int)
        inside = (source_y >= 0) & (source_y < 9) & (source_x >= 0) & (source_x < 9)
        expected = np.where(inside, image[source_y.clip(0, 8), source_x.clip(0, 8)], 0)
        assert (view == expected).mean() > 0.97, "but for coordinates on the edge between two pixels"


def test_cutout_blackens_one_square_anywhere() -> None:
    some = samples(300, 1, 12, 12)
    views = shown(Views(crop=0, cutout=0.5), some)
    black = views == 0
    assert (views[~black] == some.images[~black]).all()
    counts = black.flatten(1).sum(1)
    assert counts.max() == 36
    assert counts.min() >= 9, "at least a quarter lies inside"
    assert black.any(0).all(), "every pixel is hit by some"
    for mask in black[:, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum(), "a rectangle"


def test_mixup_blends_two_views_as_its_labels_say() -> None:
    values = torch.arange(30, dtype=torch.uint8) * 8
    some = Samples(values.reshape(30, 1, 1, 1).expand(30, 1, 6, 6), torch.arange(30))
    images, shares = Views(crop=0, mixup=1.0)(some, 0, 0, torch.arange(30), 30)
    assert torch.allclose(shares.sum(1), torch.ones(30))
    assert ((shares > 0).sum(1) <= 2).all()
    expected = shares @ values.float()
    assert (images[:, 0, 0, 0].float() - expected).abs().max() <= 0.51


def test_cutmix_pastes_a_box_of_the_size_that_its_labels_say() -> None:
    values = torch.arange(1, 41, dtype=torch.uint8)
    some = Samples(values.reshape(40, 1, 1, 1).expand(40, 1, 8, 8), torch.arange(40))
    images, shares = Views(crop=0, cutmix=1.0)(some, 0, 0, torch.arange(40), 40)
    own = (images == some.images).flatten(1).double().mean(1)
    mixed = shares.argmax(1) != torch.arange(40)
    assert torch.allclose(shares[torch.arange(40), torch.arange(40)].double(), own, atol=1e-4)
    assert mixed.any()
    assert not mixed.all()


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixing_weights_follow_the_beta_distribution(alpha: float) -> None:
    count = 4000
    some = Samples(torch.ones(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))
    _, shares = Views(crop=0, mixup=alpha)(some, 3, 0, torch.arange(count), count)
    weights = shares.diagonal().double()
    assert weights.mean() == pytest.approx(0.5, abs=0.03)
    assert weights.var() == pytest.approx(beta(alpha, alpha).var(), rel=0.05)


def test_mixtures_exclude_each_other() -> None:
    with pytest.raises(SpecError, match="exclude each other"):
        Views(mixup=1, cutmix=1)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 3))
def test_blocks_of_draws_differ(seed: int, epoch: int, block: int) -> None:
    one, other = (torch.stack(draw(seed, epoch, torch.arange(4), b)) for b in (block, block + 1))
    assert not torch.equal(one, other)


def test_draws_are_uniform_and_uncorrelated() -> None:
    a, b, c, _ = (word.double() / 2**32 for word in draw(3, 5, torch.arange(20000)))
    for word in (a, b, c):
        assert abs(word.mean() - 0.5) < 0.01
        assert abs(word.var() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(torch.stack([a, b, c, a.roll(1)])).triu(1)).max() < 0.03


@pytest.mark.parametrize("views", [Views(flip=True, rotate=10, cutout=0.5), Views(mixup=1.0), Views(cutmix=1.0)])
@pytest.mark.parametrize("held", [0, 20_000, 10**9])
def test_an_epochs_views_are_the_same_bits_however_many_are_made_at_once(
    views: Views, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("undistill.data.batches.HELD", held)
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = ViewDataset(Samples(images, torch.arange(50) % 4), views, 3, 4)
    parts = torch.randperm(50, generator=torch.Generator().manual_seed(1)).tensor_split(7)
    for part, (shown, labels) in zip(parts, dataset.shows(2, parts), strict=True):
        alone = dataset.show(2, part)
        assert torch.equal(shown, alone[0])
        assert torch.equal(labels, alone[1])


def test_parts_are_grouped_in_their_order_up_to_a_size() -> None:
    parts = [torch.arange(size) for size in (3, 3, 5, 1, 9, 2)]
    sizes = [[len(part) for part in group] for group in grouped(parts, 6)]
    assert sizes == [[3, 3], [5, 1], [9], [2]]
    assert list(grouped([], 6)) == []
