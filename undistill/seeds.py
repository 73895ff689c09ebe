"""One seed from the user, an independent one for every role."""

import hashlib


def derive(seed: int, role: str) -> int:
    """31 bits that depend on `seed` and on what they are for ("victim", "student", ...)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{role}".encode()).digest()[:4]) >> 1
