"""Street View House Numbers (Netzer et al. 2011), from the MATLAB files of its authors."""

from pathlib import Path

import numpy as np
import torch

from undistill.data.mat import read_mat
from undistill.data.official import File, Official, reading
from undistill.data.split import Samples

SIDE = 32  # pixels


class SVHN(Official):
    """99,289 house numbers seen from the street, cropped to one digit, 32 x 32 (Netzer et al. 2011)."""

    home = "http://ufldl.stanford.edu/housenumbers"
    folders = ("svhn", "")
    files = (
        File("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        File("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    )
    counts = (
        (4_948, 13_861, 10_585, 8_497, 7_458, 6_882, 5_727, 5_595, 5_045, 4_659),
        (1_744, 5_099, 4_149, 2_882, 2_523, 2_384, 1_977, 2_019, 1_660, 1_595),
    )

    def read_from(self, folder: Path) -> tuple[Samples, Samples, list[str]]:
        train, test = (_read(folder / file.name) for file in self.files)
        return train, test, [str(digit) for digit in range(10)]


def _read(path: Path) -> Samples:
    """`X` is (H, W, C, N); in `y` the digit 0 is written as 10."""
    with reading(path):
        largest = max(map(sum, SVHN.counts)) * 3 * SIDE * SIDE + 2**20
        arrays = read_mat(path, largest)
        images, labels = arrays["X"], arrays["y"]
        count = images.shape[-1]
        if images.shape != (SIDE, SIDE, 3, count) or labels.shape != (count, 1):
            raise ValueError(f"X has the shape {images.shape}, y {labels.shape}")
    pixels = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return Samples(torch.from_numpy(pixels), torch.from_numpy(labels.ravel().astype(np.int64) % 10))
