"""Street View House Numbers (Netzer et al. 2011), from the MATLAB files of its authors."""

from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat, whosmat

from undistill.data.official import File, Official, reading
from undistill.data.split import Samples


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
    """`X` is (H, W, C, N); in `y` the digit 0 is written as 10. A small file may hold more than fits into memory."""
    with reading(path):
        announced = {name: (shape, kind) for name, shape, kind in whosmat(str(path))}
        count = announced["X"][0][-1]
        if announced["X"] != ((32, 32, 3, count), "uint8") or announced["y"] != ((count, 1), "uint8"):
            raise ValueError(f"X is {announced['X']}, y is {announced['y']}")
        if count > max(map(sum, SVHN.counts)):
            raise ValueError(f"{count:,} images")
        arrays = loadmat(str(path), variable_names=["X", "y"])
        images, labels = arrays["X"], arrays["y"].ravel().astype(np.int64) % 10
    pixels = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return Samples(torch.from_numpy(pixels), torch.from_numpy(labels))
