"""`Limits` of a server."""

from dataclasses import dataclass

from undistill.core.files import MIB


@dataclass(frozen=True)
class Limits:
    """What one request may be, and how much may be under way."""

    images: int = 64
    """Images of a request, and of a batch."""
    body: int = 64 * MIB
    """Bytes of a request."""
    pixels: int = 25_000_000
    """Of an encoded picture."""
    seconds: float = 30.0
    """In which a body must arrive, and then an answer be given."""
    under_way: int = 1024
    """Images that may be under way, in all requests together."""
    requests: int = 128
    """Requests that may be under way."""


USUAL = Limits()
