"""Replayable augmentation: a view is a pure function of (seed, epoch, sample index).

Its randomness comes from a counter-based generator, so any view can be made again, on any device,
in any order and in any batch, with the same bits.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from undistill.spec import Spec

_MASK = 0xFFFFFFFF


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


def draw(seed: int, epoch: int, index: Tensor) -> list[Tensor]:
    """Four independent words of 32 random bits for each sample `index` (B,) in `epoch`."""
    zero = torch.zeros_like(index)
    return philox([index, zero + epoch, zero, zero], (seed & _MASK, seed >> 32 & _MASK))


class Views(Spec):
    """Pad-and-crop and horizontal flip, one independent draw per sample."""

    crop: float = Field(0.125, ge=0, le=1)
    """Padding before the random crop, as a share of the side (1/8 is the published 4 of 32)."""
    flip: bool = False
    """Mirror half of the views; right for photographs, wrong for digits and text."""

    def __call__(self, images: Tensor, seed: int, epoch: int, index: Tensor) -> Tensor:
        """(B, C, H, W) uint8 images with their (B,) indices -> float views in [0, 1]."""
        size, channels, height, width = images.shape
        down, right, mirror, _ = draw(seed, epoch, index)
        pad_y, pad_x = round(self.crop * height), round(self.crop * width)
        rows = torch.arange(height, device=images.device) + (down % (2 * pad_y + 1))[:, None]
        columns = torch.arange(width, device=images.device) + (right % (2 * pad_x + 1))[:, None]
        if self.flip:
            columns = torch.where(mirror[:, None] % 2 == 1, columns.flip(1), columns)
        padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
        sample = torch.arange(size, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[:, None, None]
        return to_float(padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]])


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1]."""
    return images.float() / 255
