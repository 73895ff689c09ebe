"""`Batches`: what arrives while the model is busy is answered together."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from undistill.core.errors import ModelError
from undistill.serving.refusals import Refusal

Outputs = list[NDArray[Any]]
"""Arrays whose first dimension is that of the images."""
Predict = Callable[[NDArray[np.float32]], Outputs]


class _Asked(NamedTuple):
    images: NDArray[np.float32]
    answer: "asyncio.Future[Outputs]"


class Batches:
    """`await batches(images)`: the outputs for images (B, C, H, W).

    While the model works, requests wait and become one batch; a model that is idle is asked at once. So a batch costs
    nobody a delay, and grows with the load.
    """

    def __init__(self, predict: Predict, *, largest: int, most: int, workers: int = 1) -> None:
        """
        Args:
            predict: the model, called in threads of its own.
            largest: images of a batch, and so of a request.
            most: images that may be under way; more are refused.
            workers: batches that are under way side by side, above 1 for a model that is elsewhere.
        """
        self.predict, self.largest, self.most = predict, largest, most
        self.under_way = 0
        """Images that were asked, and are not answered yet."""
        self.on_batch: Callable[[int], None] = lambda size: None
        """Told of the size of every batch."""
        self._queue: deque[_Asked] = deque()
        self._idle = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="model")
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Inside, `count` more images are under way; `Refusal` where that would be too many."""
        if self.under_way and self.under_way + count > self.most:
            raise Refusal(503, "Too many images are under way; ask again in a second.", retry_after="1")
        self.under_way += count
        try:
            yield
        finally:
            self.under_way -= count

    async def __call__(self, images: NDArray[np.float32]) -> Outputs:
        asked = _Asked(images, asyncio.get_running_loop().create_future())
        self._queue.append(asked)
        self._start()
        return await asked.answer

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Hand what waits to the model, as far as it is idle."""
        while self._idle and (batch := self._next()):
            self._idle -= 1
            task = asyncio.get_running_loop().create_task(self._answer(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> list[_Asked]:
        """The requests of the next batch, in the order in which they came; those that gave up are passed over."""
        batch: list[_Asked] = []
        size = 0
        while self._queue and size + len(self._queue[0].images) <= self.largest:
            asked = self._queue.popleft()
            if not asked.answer.done():
                batch.append(asked)
                size += len(asked.images)
        return batch

    async def _answer(self, batch: list[_Asked]) -> None:
        try:
            images = batch[0].images if len(batch) == 1 else np.concatenate([asked.images for asked in batch])
            self.on_batch(len(images))
            outputs = await asyncio.get_running_loop().run_in_executor(self._threads, self.predict, images)
            _require_answers(outputs, len(images))
        except BaseException as error:  # whoever waits learns of it, whatever it was
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        else:
            first = 0
            for asked in batch:
                last = first + len(asked.images)
                if not asked.answer.done():
                    asked.answer.set_result([output[first:last] for output in outputs])
                first = last
        finally:
            self._idle += 1
            self._start()


def _require_answers(outputs: Outputs, count: int) -> None:
    """Raise `ModelError` unless every image has an answer of its own, of finite numbers."""
    if any(len(output) != count for output in outputs):
        raise ModelError(f"The model was asked about {count} images, and answered {[len(one) for one in outputs]}.")
    if not all(np.isfinite(output).all() for output in outputs):
        raise ModelError("The model answers NaN or infinity.")
