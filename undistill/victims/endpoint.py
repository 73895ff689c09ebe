"""`Endpoint`: a black box as a victim. Each answer is bought once, and remembered for every thief and later command."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

import torch
from torch import Tensor

from undistill.core.errors import VictimError
from undistill.data.split import Samples
from undistill.victims.answer import Answer, Form
from undistill.victims.black_box import Ask, Reading
from undistill.victims.purchases import Purchases
from undistill.victims.victim import Victim

CLOSE = 1e-6  # to a whole level of 256


class Endpoint(Victim):
    """Asks a black box, and keeps what it answered before anything else is done with it.

    The answer to an image is kept under the image. Where answers vary it is kept under the name of the asking, so that
    a stopped audit goes on with the answers it had, and no two askings share one.
    """

    def __init__(
        self,
        ask: Ask,
        reading: Reading,
        purchases: Purchases,
        *,
        identity: str,
        classes: tuple[str, ...],
        repeatable: bool = True,
        any_image: bool = True,
        batch_size: int = 512,
        workers: int = 1,
    ) -> None:
        self.verify: Callable[[], None] | None = None
        """Called once, before anything is bought in this process."""
        self.classes, self.purchases, self.any_image = classes, purchases, any_image
        self._ask, self._reading, self._identity, self._repeatable = ask, reading, identity, repeatable
        self._batch_size, self._workers = batch_size, workers

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def repeatable(self) -> bool:
        return self._repeatable

    @property
    def form(self) -> Form:
        return self._reading.form

    def answer(self, inputs: Tensor, at: str = "") -> Answer:
        images = inputs.detach().float().cpu()
        keys = image_keys(images)
        if not self.repeatable:
            keys = [f"{at}/{number}/{key}" for number, key in enumerate(keys)]
        found = self.purchases.find(keys)
        if any(key not in found for key in keys):
            with self.purchases.alone():
                found |= self.purchases.find([key for key in keys if key not in found])
                self._buy({key: image for key, image in zip(keys, images, strict=True) if key not in found})
            found |= self.purchases.find([key for key in keys if key not in found])
        return Answer.of_served(torch.stack([found[key] for key in keys]).to(inputs.device))

    def ask(self, images: Tensor) -> Answer:
        """The answer to `images` now, billed and not remembered."""
        answer = self._reading(self._ask(images))
        self.purchases.bill("billed", len(images))
        return answer

    def _buy(self, lacking: dict[str, Tensor]) -> None:
        """Ask about these images, and keep each answer as soon as it is there."""
        if self.verify and lacking:
            self.verify()
            self.verify = None
        names, images = list(lacking), list(lacking.values())
        places = iter(range(0, len(names), self._batch_size))
        with ThreadPoolExecutor(self._workers) as pool:  # whose end waits for what is under way, which is kept
            running: set[Future[None]] = set()
            while True:
                for place in islice(places, self._workers - len(running)):
                    part = slice(place, place + self._batch_size)
                    running.add(pool.submit(self._buy_part, names[part], torch.stack(images[part])))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()

    def _buy_part(self, keys: Sequence[str], images: Tensor) -> None:
        """Ask about some images, and keep the answers; those that cannot be read are billed, too."""
        outputs = self._ask(images)
        try:
            served = self._reading(outputs).to_served()
            if len(served) != len(keys):
                raise VictimError(f"The black box was asked about {len(keys)} images and gave {len(served)} answers.")
        except VictimError:
            self.purchases.bill("billed", len(keys))
            raise
        self.purchases.add(keys, served)


def image_keys(images: Tensor) -> list[str]:
    """SHA-256 of each image (C, H, W) in [0, 1].

    Of an image in 256 levels it is that of its pixels as uint8, which `Samples.hashes` gives; of others that of their
    fp32 numbers.
    """
    levels = (images * 255).round()
    whole = ((levels / 255 - images).abs() <= CLOSE).flatten(1).all(1).tolist()
    bytes_of, numbers = levels.clamp(0, 255).to(torch.uint8).numpy(), images.numpy()
    return [
        hashlib.sha256(bytes_of[place].tobytes() if exact else b"fp32" + numbers[place].tobytes()).hexdigest()
        for place, exact in enumerate(whole)
    ]


def keys_of(samples: Samples) -> list[str]:
    """The same for samples, whose images have 256 levels."""
    return [sha.hex() for sha in samples.hashes(of_pixels=True)]
