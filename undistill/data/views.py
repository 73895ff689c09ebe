"""Replayable augmentation: a view is a pure function of (seed, epoch, sample index).

Its randomness comes from a counter-based generator and its arithmetic is whole numbers, so any view
can be made again, on any device, in any order and in any batch, with the same bits.
"""

from functools import cache
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from undistill.core.spec import Spec
from undistill.data.split import Samples

_MASK = 0xFFFFFFFF
_ONE = 1 << 16  # 1 in fixed-point numbers
_STEPS = 4096  # values that an angle or a mixing weight can take


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words of 32 random bits for each counter.

    counter: four int64 tensors of one shape, each value below 2**32. int64 products wrap, which
    leaves their 64 bits right; the mask makes the arithmetic shift a logical one.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def draw(seed: int, epoch: int, index: Tensor, block: int = 0) -> list[Tensor]:
    """Four independent words of 32 random bits for each sample `index` (B,) in `epoch`; more from other blocks."""
    zero = torch.zeros_like(index)
    return philox([index, zero + epoch, zero + block, zero], (seed & _MASK, seed >> 32 & _MASK))


class Mixture(NamedTuple):
    """How each of B views is mixed with that of another sample."""

    partner: Tensor
    """(B,) indices of the other samples."""
    kept: Tensor
    """(B,) share of the view's own sample, fixed-point."""
    box: Tensor | None = None
    """(B, 1, H, W): where the other sample is pasted; None where the two are blended."""

    @property
    def share(self) -> Tensor:
        """(B,) share of the view's own sample, from 0 to 1."""
        return self.kept.float() / _ONE


class Views(Spec):
    """Augmentation, one independent draw per sample: rotate, pad and crop, flip, cut out, then mix with another."""

    crop: float = Field(0.125, ge=0, le=1)
    """Padding before the random crop, as a share of the side (1/8 is the published 4 of 32)."""
    flip: bool = False
    """Mirror half of the views; right for photographs, wrong for digits and text."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Largest angle in degrees, either way; nearest pixel, black outside."""
    cutout: float = Field(0.0, ge=0, le=1)
    """Side of a black square, as a share of the shorter side (DeVries and Taylor 2017)."""
    mixup: float = Field(0.0, ge=0, le=100)
    """alpha of mixup (Zhang et al., ICLR 2018): the weight is drawn from Beta(alpha, alpha); 0 is off."""
    cutmix: float = Field(0.0, ge=0, le=100)
    """alpha of CutMix (Yun et al., ICCV 2019); 0 is off."""
    n_views: int = Field(0, ge=0, le=1_000_000)
    """How many different views each sample has, taken in turn; 0 makes new ones in every epoch."""

    @model_validator(mode="after")
    def _one_mixture(self) -> "Views":
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix exclude each other")
        return self

    def shown(self, epoch: int) -> int:
        """The epoch whose views `epoch` shows, again if there are only `n_views`."""
        return epoch % self.n_views if self.n_views else epoch

    def __call__(
        self, samples: Samples, seed: int, epoch: int, index: Tensor, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """uint8 views (B, C, H, W) of the samples `index` (B,), and their labels (B,), mixed: shares (B, K)."""
        epoch = self.shown(epoch)
        images, mixture = self._alone(samples, seed, epoch, index), self.mixture(samples, seed, epoch, index)
        labels = mixed_labels(samples, index, mixture, num_classes)
        if mixture is None:
            return images, labels
        others = self._alone(samples, seed, epoch, mixture.partner)
        if mixture.box is None:
            return _blend(images, others, mixture.kept), labels
        return torch.where(mixture.box, others, images), labels

    def mixture(self, samples: Samples, seed: int, epoch: int, index: Tensor) -> Mixture | None:
        """The mixture of each sample `index` (B,) in `epoch`; None unless views are mixed."""
        if not (self.mixup or self.cutmix):
            return None
        which, share, y, x = draw(seed, self.shown(epoch), index, block=2)
        weight = _beta(self.mixup or self.cutmix, index.device)[share % _STEPS]
        if self.mixup:
            return Mixture(which % len(samples), weight)
        height, width = samples.images.shape[2:]
        side = ((_ONE - weight).double() * _ONE).sqrt().long()
        box = _box((height, width), y % height, x % width, side * height >> 16, side * width >> 16)
        kept = _ONE - box.flatten(1).sum(1) * _ONE // (height * width)
        return Mixture(which % len(samples), kept, box)

    def _alone(self, samples: Samples, seed: int, epoch: int, index: Tensor) -> Tensor:
        images = samples.images[index]
        height, width = images.shape[2:]
        down, right, mirror, angle = draw(seed, epoch, index)
        y, x = _window(height, self.crop, down)[:, :, None], _window(width, self.crop, right)[:, None, :]
        if self.flip:
            x = torch.where(mirror[:, None, None] % 2 == 1, x.flip(2), x)
        if self.rotate:
            y, x = _turn(y, x, (height, width), _angles(self.rotate, index.device)[angle % _STEPS])
        images = _pixels(images, y, x)
        if not self.cutout:
            return images
        side = torch.full_like(index, round(self.cutout * min(height, width)))
        y, x, *_ = draw(seed, epoch, index, block=1)
        return images * ~_box((height, width), y % height, x % width, side, side)


def mixed_labels(samples: Samples, index: Tensor, mixture: Mixture | None, num_classes: int) -> Tensor:
    """Labels (B,) of the samples `index` (B,); shares (B, K) where they are mixed."""
    labels = samples.labels[index]
    if mixture is None:
        return labels
    return _shares(labels, samples.labels[mixture.partner], mixture.share, num_classes)


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1]."""
    return images.float() / 255


def _window(length: int, crop: float, word: Tensor) -> Tensor:
    """(B, length) coordinates of a random window of the padded image; those outside it are padding."""
    padding = round(crop * length)
    return torch.arange(length, device=word.device) - padding + (word % (2 * padding + 1))[:, None]


def _turn(y: Tensor, x: Tensor, size: tuple[int, int], turn: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates turned about the centre. turn: (B, 2) cosine and sine, fixed-point. Twice the offset is whole."""
    height, width = size
    cosine, sine = turn[:, 0, None, None], turn[:, 1, None, None]
    down, right = 2 * y - (height - 1), 2 * x - (width - 1)
    turned_y, turned_x = cosine * down + sine * right, cosine * right - sine * down
    return (turned_y + height * _ONE) >> 17, (turned_x + width * _ONE) >> 17


def _pixels(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The pixels at (y, x), which broadcast to (B, H, W); black outside the image."""
    size, channels, height, width = images.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    place = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    pixels = images.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, channels, -1))
    return pixels.view(size, channels, *inside.shape[1:]) * inside[:, None]


def _box(size: tuple[int, int], y: Tensor, x: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """(B, 1, H, W): inside a box centred at (y, x), all (B,), cut off at the border."""
    rows, columns = (torch.arange(length, device=y.device) for length in size)
    top, left = (y - height // 2)[:, None], (x - width // 2)[:, None]
    down = (rows >= top) & (rows < top + height[:, None])
    right = (columns >= left) & (columns < left + width[:, None])
    return (down[:, :, None] & right[:, None, :])[:, None]


def _blend(images: Tensor, others: Tensor, weight: Tensor) -> Tensor:
    """weight * images + (1 - weight) * others; the weight (B,) is fixed-point."""
    share = weight[:, None, None, None].int()
    return ((images * share + others * (_ONE - share) + _ONE // 2) >> 16).to(torch.uint8)


def _shares(labels: Tensor, others: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """(B, K) shares of two labels, of which the first has `share` (B,)."""
    share = share[:, None]
    shares = torch.zeros(len(labels), num_classes, device=labels.device)
    one, other = labels.clamp_min(0)[:, None], others.clamp_min(0)[:, None]
    shares = shares.scatter_add_(1, one, share).scatter_add_(1, other, 1 - share)
    return shares.masked_fill_((labels < 0)[:, None], torch.nan)  # who has no labels has no mixed ones either


@cache
def _beta(alpha: float, device: torch.device) -> Tensor:
    """Quantiles of Beta(alpha, alpha), fixed-point."""
    from scipy.stats import beta

    quantiles = beta.ppf([(i + 0.5) / _STEPS for i in range(_STEPS)], alpha, alpha)
    return torch.tensor([round(_ONE * quantile) for quantile in quantiles], device=device)


@cache
def _angles(largest: float, device: torch.device) -> Tensor:
    """(_STEPS, 2): cosine and sine of evenly spread angles, fixed-point."""
    angles = torch.deg2rad(torch.linspace(-largest, largest, _STEPS, dtype=torch.double))
    return (torch.stack([angles.cos(), angles.sin()], 1) * _ONE).round().long().to(device)
