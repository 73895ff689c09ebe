"""Intervals over students and test images; docs/statistics.md says why they are such."""

import math
import statistics
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from undistill.auditing.schema import Interval


@cache
def quantile(share: float, degrees: int) -> float:
    """Of Student's t distribution."""
    from scipy.stats import t as student_t

    return float(student_t.ppf(share, degrees))


def interval(values: Sequence[float], least: float = 0.0) -> Interval:
    """Mean and 95 % t interval. Values that are counted on few images may agree by luck: their spread is `least`."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n)
    return around(mean, quantile(0.975, n - 1) * max(statistics.stdev(values), least) / math.sqrt(n), n)


def preferred(scores: Sequence[float], images: int) -> int:
    """Place of the highest of some `scores`, shares of `images`; 0 where it is not a standard error above the first.

    The first is the listed setting: of several trials on few images, one is ahead by luck.
    """
    best = max(range(len(scores)), key=scores.__getitem__)
    error = math.sqrt(scores[0] * (1 - scores[0]) / images) if images else 0.0
    return best if scores[best] > scores[0] + error else 0


def paired_interval(differences: Sequence[float], among: int = 1) -> Interval:
    """Mean difference of two networks over images, each right (1) or wrong (0), with its 95 % interval.

    `among` is how many such differences one was chosen from; the intervals of all of them hold at once (Bonferroni).
    """
    n, mean = len(differences), statistics.fmean(differences)
    return around(mean, quantile(1 - 0.025 / among, n + 1) * math.sqrt(image_variance(np.asarray(differences))), n)


def crossed_interval(differences: NDArray[np.float64]) -> Interval:
    """Mean difference of two kinds of students with its 95 % interval, for other seeds and for other test images.

    differences: (S, N), of each seed on each image: 1 where only the first kind is right, -1 where only the second is.
    The two variances count apart, each with its own t quantile, since a few seeds say little about theirs. Seeds that
    agree by luck make it no narrower than the test images alone allow.
    """
    seeds, images = differences.shape
    mean = float(differences.mean())
    if seeds < 2:
        return Interval(mean=mean, low=None, high=None, n=seeds)
    by_seed, by_image = differences.mean(1), differences.mean(0)
    seed_variance = max(float(by_seed.std(ddof=1)), least_spread(images)) ** 2 / seeds
    rest = differences - by_seed[:, None] - by_image + mean
    noise = float((rest**2).sum()) / ((seeds - 1) * (images - 1)) / (seeds * images)  # is in the other two already
    both = image_variance(by_image)
    variance = max(both - noise, 1 / (images + 2) ** 2)
    of_seeds, of_images = quantile(0.975, seeds - 1), quantile(0.975, images + 1)
    half = math.hypot(of_seeds * math.sqrt(seed_variance), of_images * math.sqrt(variance))
    return around(mean, max(half, of_images * math.sqrt(both)), seeds)


def image_variance(differences: NDArray[np.float64]) -> float:
    """Variance of the mean of differences (N,) over images.

    Half an image is added to each kind of disagreement (Agresti and Min 2005): where two networks agree on all of few
    images, that is no proof that they agree on others.
    """
    more = len(differences) + 2
    return float((differences**2).sum() + 1 - differences.sum() ** 2 / more) / more**2


def least_spread(images: int) -> float:
    """Standard deviation of the difference of two accuracies on so many images that luck alone gives."""
    return 1 / images


def around(mean: float, half: float, n: int) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)
