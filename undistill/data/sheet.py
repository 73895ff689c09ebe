"""Many small images in one picture."""

import io
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from undistill.core.files import write_atomically

SCALE = 2  # screen pixels of an image's pixel
GAP = 2
COLUMNS = 8


def write_sheet(path: Path, images: Tensor, columns: int = COLUMNS) -> None:
    """A PNG of images (N, C, H, W) uint8, C = 1 or 3, row by row."""
    images = images.cpu().repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
    images = F.pad(images, (0, GAP, 0, GAP), value=255)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=255)
    count, channels, height, width = images.shape
    grid = images.view(count // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(count // columns * height, columns * width, channels)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2).numpy()).save(buffer, format="PNG")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
