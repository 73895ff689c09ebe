"""`Limits` of a server."""

from dataclasses import dataclass

from undistill.core.files import MIB

JSON = 24  # bytes of a number that is written out


@dataclass(frozen=True)
class Limits:
    """Largest size of one request, and of all that are under way."""

    images: int = 64
    """Images of a request, and of a batch."""
    body: int | None = None
    """Bytes of a request; None is what so many images of the model take."""
    held: int = 512 * MIB
    """Bytes of all bodies that are under way together."""
    pixels: int = 25_000_000
    """Of all encoded pictures of a request."""
    seconds: float = 30.0
    """In which a body must arrive, and then an answer be given."""
    under_way: int = 1024
    """Images that may be under way, in all requests together."""
    requests: int = 128
    """Requests that may be under way."""

    def of_body(self, numbers: int) -> int:
        """Bytes of a request, for images of so many numbers: in JSON, but no more than 64 MiB, and as binary."""
        if self.body is not None:
            return self.body
        whole = self.images * numbers
        return MIB + max(4 * whole, min(JSON * whole, 64 * MIB))


USUAL = Limits()
