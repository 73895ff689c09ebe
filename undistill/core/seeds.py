"""One seed from the user, an independent one for every role."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive(seed: int, role: str) -> int:
    """31 bits that depend on `seed` and on what they are for ("victim", "student", ...)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{role}".encode()).digest()[:4]) >> 1


def epoch_seed(seed: int, epoch: int) -> int:
    """A generator seed for (seed, epoch), distinct for every pair below 2**32."""
    return seed << 32 | epoch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generators start at `seed` inside, and go on outside as if nothing had been."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
