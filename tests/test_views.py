import torch

from undistill.views import Views, draw, philox, to_float


def words(value: int) -> list[torch.Tensor]:
    return [torch.tensor([value])] * 4


def test_philox_gives_the_published_test_vectors() -> None:
    """Known answers of Random123 for philox4x32-10."""
    zeros = [int(w) for w in philox(words(0), (0, 0))]
    ones = [int(w) for w in philox(words(0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF))]
    assert zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_view_depends_on_seed_epoch_and_index_alone() -> None:
    images = torch.randint(0, 256, (40, 3, 12, 10), dtype=torch.uint8)
    index, views = torch.arange(40), Views(crop=0.25, flip=True)
    whole = views(images, 7, 3, index)
    order = torch.randperm(40)
    shuffled = torch.cat([views(images[part], 7, 3, part) for part in order.split(7)])
    assert torch.equal(shuffled, whole[order])
    for other in (views(images, 8, 3, index), views(images, 7, 4, index), views(images, 7 + 2**32, 3, index)):
        assert not torch.equal(other, whole)


def test_crops_are_windows_of_the_padded_image_and_all_occur() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 8, 8)
    padded = torch.zeros(10, 10, dtype=torch.uint8)
    padded[1:9, 1:9] = image[0]
    windows = {tuple(padded[y : y + 8, x : x + 8].flatten().tolist()) for y in range(3) for x in range(3)}
    index = torch.arange(400)
    views = Views(crop=0.125)(image.expand(400, 1, 8, 8), 0, 0, index)
    seen = {tuple(view.flatten().tolist()) for view in (views * 255).round().to(torch.uint8)}
    assert seen == windows


def test_flip_mirrors_half_of_the_views() -> None:
    images = torch.randint(0, 256, (600, 1, 4, 5), dtype=torch.uint8)
    views = Views(crop=0, flip=True)(images, 0, 0, torch.arange(600))
    same = (views == to_float(images)).flatten(1).all(1)
    mirrored = (views == to_float(images.flip(3))).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 240 < mirrored.sum() < 360


def test_no_augmentation_is_the_image() -> None:
    images = torch.randint(0, 256, (9, 3, 6, 6), dtype=torch.uint8)
    assert torch.equal(Views(crop=0)(images, 1, 1, torch.arange(9)), to_float(images))


def test_draws_are_uniform_and_uncorrelated() -> None:
    a, b, c, _ = (word.double() / 2**32 for word in draw(3, 5, torch.arange(20000)))
    for word in (a, b, c):
        assert abs(word.mean() - 0.5) < 0.01
        assert abs(word.var() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(torch.stack([a, b, c, a.roll(1)])).triu(1)).max() < 0.03
