"""Pools: images of a thief who has none of the owner's."""

import torch
import torch.nn.functional as F

from undistill.core.errors import DataError, remark
from undistill.data.copies import comparable
from undistill.data.files import ImageFiles
from undistill.data.source import Source
from undistill.data.split import Data, Samples, joined


def read_pool(source: str, data: Data) -> Samples:
    """All images of `source`, without labels, in the shape of those of `data`.

    Raises `DataError` where some are among the test images of `data`: a thief who asks for these is measured on what he
    was told. A remark says how many are training images.
    """
    parts = Source.parse(source).read()
    images = joined([part for part in (parts.train, parts.validation, parts.test) if part is not None]).unlabelled
    shaped = _shaped(images, data, source)
    _require_apart(shaped, data, source)
    return shaped


def _require_apart(pool: Samples, data: Data, source: str) -> None:
    asked, measured, owned = map(set, comparable(pool, data.test, data.train))
    if known := len(asked & measured):
        raise DataError(
            f"{known:,} images of the pool {source} are also test images, on which thieves are measured. Name a "
            "pool of other images."
        )
    if known := len(asked & owned):
        remark(f"{known:,} images of the pool are also training images of the model.")


def _shaped(pool: Samples, data: Data, source: str) -> Samples:
    """The pool with the channels and the size of the data's images; a remark says what was changed."""
    channels, height, width = data.shape
    if pool.images.shape[1:] == data.shape:
        return pool
    found = " x ".join(map(str, pool.images.shape[1:]))
    wanted = " x ".join(map(str, data.shape))
    if isinstance(pool.images, ImageFiles):
        raise DataError(
            f"The images of the pool {source} are {found} (channels, height, width), the model's {wanted}, and "
            f"they are too many to be held in memory. Read fewer, or in that size: Folder(path=..., size={height})."
        )
    images = pool.images.float()
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)
    remark(f"The pool's images are {found} (channels, height, width); they are changed to {wanted}.")
    return Samples(images.round().clamp(0, 255).to(torch.uint8), pool.labels)
