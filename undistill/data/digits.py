"""1,797 real handwritten digits, 8 x 8, that scikit-learn carries: no download."""

import torch
from pydantic import Field

from undistill.data.source import Source
from undistill.data.split import Parts, Samples


class Digits(Source):
    """Optical recognition of handwritten digits (UCI; Alpaydin and Kaynak 1998)."""

    published = True

    test: float | None = Field(1 / 3, gt=0, lt=1)

    def read(self) -> Parts:
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = torch.from_numpy(raw.images * (255 / 16)).round().to(torch.uint8)
        return Parts(Samples(images[:, None], torch.from_numpy(raw.target).long()), [str(k) for k in range(10)])
