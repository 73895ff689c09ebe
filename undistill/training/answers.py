"""Remembered answers: a frozen network answers each view once, however many ask.

A whole epoch of views is answered at once, in the order of the samples and in parts of fixed size. So
an answer's bits depend neither on the order in which students ask nor on whether it was remembered.
Where a folder is given, epochs are kept there and found again by later commands: as `KEY/EPOCH.safetensors`, or
where there are many images in blocks, `KEY/BLOCK/EPOCH.safetensors`, which several processes share among them. KEY
names the weights, the code, the views and the compute settings.
"""

import contextlib
import hashlib
import inspect
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import undistill
from undistill.core import distributed
from undistill.core.files import GIB, locked, write_atomically
from undistill.core.identity import fingerprint, program_sha256
from undistill.core.seeds import derive, seeded
from undistill.core.unshown import LOG_ZERO
from undistill.data.batches import Batch, ViewDataset
from undistill.data.split import Samples
from undistill.data.views import Views, to_float
from undistill.models.model import frozen
from undistill.models.trial import agree, device_of
from undistill.models.weights import bytes_of, weights_sha256
from undistill.training.autotune import autotune
from undistill.training.captured import is_recording, keep
from undistill.training.compute import EXACT, Compute, machine
from undistill.training.losses import filled, require_finite

log = logging.getLogger(__name__)

REMEMBER = 4.0  # GiB
PART = 512  # images answered together
BLOCKS = 16  # at most, of an epoch
COUNTED = 10.0  # seconds for which the size of a folder is known
LEAST = 8 * PART  # images of a block, unless there are fewer
TRIED = 64  # images of the trial that chooses the compute settings
ASKED = 5  # times that a network is measured whose answers vary
HELD = GIB // 4  # bytes of answers held in memory, beside those of the present epoch


@dataclass
class AnswerStore:
    """Files of remembered answers, one for each epoch. After the first trouble nothing more is written."""

    folder: Path | None = None
    limit: float = REMEMBER * GIB
    """Largest size of the folder in bytes; 0 keeps nothing, neither on disk nor in memory."""

    def __post_init__(self) -> None:
        self._trouble = ""
        self._counted, self._counted_at = 0, -math.inf

    @property
    def open(self) -> bool:
        """Whether later commands may find here what is asked now."""
        return self.folder is not None and self.limit > 0

    def load(self, key: str, epoch: int, shape: tuple[int, int]) -> Tensor | None:
        """The answers of one epoch, mapped into memory; None unless they are whole, finite, and those of `key`."""
        path = self._path(key, epoch)
        try:
            with self.guard():
                if not path.exists():
                    return None
                with safe_open(path, framework="pt") as file:
                    about: dict[str, str] = file.metadata() or {}
                    form = file.get_slice("answers")
                    right = tuple(form.get_shape()) == shape and form.get_dtype() in ("F32", "BF16")
                    answers: Tensor | None = file.get_tensor("answers") if right else None
                if answers is not None and about == _about(key, epoch, answers) and answers.isfinite().all():
                    return answers
                log.warning("%s is damaged, or not of this network; those answers are asked again.", path)
        except SafetensorError as error:
            log.warning("%s cannot be read (%s); those answers are asked again.", path, error)
        return None

    def save(self, key: str, epoch: int, answers: Tensor) -> None:
        """Keep the answers of one epoch, if there is room and the disk takes them."""
        with self.guard():
            if self._trouble or distributed.rank() > 0:
                return
            if self._size() + answers.nbytes > self.limit:
                self._close(
                    f"{self.folder} would pass the limit of {self.limit / GIB:g} GiB (--remember); "
                    "recipe.views.n_views bounds it"
                )
                return
            data = save({"answers": answers}, _about(key, epoch, answers))
            write_atomically(self._path(key, epoch), lambda file: file.write(data))
            self._counted += len(data)

    def gather(self, key: str, epoch: int, shapes: Sequence[tuple[int, int]], make: Callable[[int], Tensor]) -> Tensor:
        """The answers of one epoch: its blocks are found, or made by whichever processes need them, each by one.

        `make` gives the answers of the block of that number; `shapes` are those of all blocks.
        """
        if len(shapes) == 1:
            return cast(Tensor, self._block(key, epoch, shapes[0], partial(make, 0), wait=True))
        whole = sum(rows for rows, _ in shapes), shapes[0][1]
        if (found := self._find(key, epoch, whole)) is not None:  # which torchrun has left
            return found
        blocks: dict[int, Tensor] = {}

        def take(number: int, *, wait: bool) -> None:
            block = self._block(f"{key}/{number:02d}", epoch, shapes[number], partial(make, number), wait=wait)
            if block is not None:
                blocks[number] = block

        while missing := [number for number in range(len(shapes)) if number not in blocks]:
            known = len(blocks)
            for number in missing:
                take(number, wait=False)
            if len(blocks) == known:  # other processes make all that is missing
                take(missing[0], wait=True)
        return torch.cat([blocks[number] for number in range(len(shapes))])

    def _block(
        self, key: str, epoch: int, shape: tuple[int, int], make: Callable[[], Tensor], *, wait: bool
    ) -> Tensor | None:
        """The block, found or made; None while another process makes it, unless this one is to `wait` for that."""
        if (found := self._find(key, epoch, shape)) is not None:
            return found
        with self._alone(key, wait) as mine:
            if not mine:
                return None
            if (found := self._find(key, epoch, shape)) is not None:
                return found
            made = make()
            self.save(key, epoch, made)
        return made

    def _find(self, key: str, epoch: int, shape: tuple[int, int]) -> Tensor | None:
        found = self.load(key, epoch, shape)
        return found if distributed.all_true(found is not None) else None

    @contextlib.contextmanager
    def _alone(self, key: str, wait: bool) -> Iterator[bool]:
        """Whether this process alone may make answers of `key` inside; without a disk that works, all may."""
        mine = True
        with contextlib.ExitStack() as stack:
            if not self._trouble and distributed.rank() == 0:
                with self.guard():
                    try:
                        stack.enter_context(locked(self._path(key, 0).with_name(".lock"), wait=wait))
                    except Timeout:
                        mine = False
            yield mine

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn an error of the disk inside into the end of remembering; the work goes on."""
        try:
            yield
        except OSError as error:
            self._close(f"{error.filename or self.folder}: {error.strerror or error}")

    def _close(self, why: str) -> None:
        if not self._trouble:
            log.warning("No more answers are remembered (%s). The work goes on and asks again.", why)
        self._trouble = why

    def _path(self, key: str, epoch: int) -> Path:
        assert self.folder is not None
        whole, _, block = key.partition("/")
        return self.folder / whole[:20] / block / f"{epoch:05d}.safetensors"

    def _size(self) -> int:
        """Bytes of all files, counted anew after some seconds."""
        assert self.folder is not None
        if time.monotonic() - self._counted_at > COUNTED:
            self._counted = sum(path.stat().st_size for path in self.folder.glob("**/*.safetensors"))
            self._counted_at = time.monotonic()
        return self._counted


def _about(key: str, epoch: int, answers: Tensor) -> dict[str, str]:
    """Metadata of a file, by which it is recognised."""
    return {"key": key, "epoch": str(epoch), "sha256": _digest(answers)}


class RememberedAnswers:
    """`answers(batch)`: the logits (B, K) of a frozen network, without gradient, each view computed once."""

    def __init__(
        self,
        network: nn.Module,
        compute: Compute = EXACT,
        store: AnswerStore | None = None,
        *,
        repeatable: bool | None = True,
    ) -> None:
        """`repeatable=False` is for a network that answers an image differently each time: it is asked anew.

        None finds out by the first images.
        """
        self.network = frozen(network)
        self.repeatable = repeatable
        self.store = (None if repeatable is False else store) or AnswerStore()
        self.computed = 0
        """Number of images on which the network was run."""
        self._asked = compute
        self._compute: Compute | None = None
        self._ready = network
        self._held: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._varying: dict[str, list[Tensor]] = {}
        """Answers to plain images, if they vary: measured once, so that all figures speak of the same ones."""

    @property
    def device(self) -> torch.device:
        return device_of(self.network)

    def __call__(self, batch: Batch) -> Tensor:
        """Views as they were shown are looked up; other images are computed."""
        shown = batch.shown
        if self.repeatable is None and not self._repeats(batch.images[:4]):
            self.store = AnswerStore()
        if not self.repeatable and is_recording():
            raise RuntimeError("The answers of the network vary.")
        if shown is None or not self.repeatable:
            return self.compute(batch.images)
        whole = keep(self.epoch(shown.dataset, shown.epoch))
        return whole[shown.index.to(whole.device)].to(batch.images.device)

    @torch.no_grad()
    def _repeats(self, images: Tensor) -> bool:
        """Find out whether the network answers the same images twice in the same way."""
        images = images.to(self.device)
        with seeded(derive(0, "repeats")):  # the training draws on as if nothing had been asked
            same = agree(self.network(images), self.network(images))
        self.repeatable = distributed.all_true(same)
        return self.repeatable

    def compute(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1], never remembered."""
        return self._run(self._choose(lambda: images), images)

    def epoch(self, dataset: ViewDataset, epoch: int) -> Tensor:
        """Logits (N, K) for all views of one epoch, in the order of the samples; `NonFinite` if one is not."""
        name = (dataset.digest, dataset.views.shown(epoch))
        if name not in self._held:
            whole = self._found_or_made(dataset, name[1])
            self._held[name] = whole.to(self.device) if whole.nbytes <= HELD else whole
            room = HELD if self.store.limit else 0
            while len(self._held) > 1 and sum(part.nbytes for part in self._held.values()) > room:
                self._held.popitem(last=False)
        self._held.move_to_end(name)
        return self._held[name]

    def plain(self, samples: Samples, num_classes: int) -> Tensor:
        """Logits (N, K) of the unaugmented images, in main memory, computed exactly whatever the settings.

        What the interface of a protected network does not show is filled in evenly. Of answers that vary, it is the
        logarithm of the mean probabilities.
        """
        return mean_answer(self.asked(samples, num_classes))

    def asked(self, samples: Samples, num_classes: int) -> list[Tensor]:
        """The same logits, once for each time that the network is asked: `ASKED` times if its answers vary."""
        dataset = ViewDataset(samples, Views(crop=0), 0, num_classes)
        if self.repeatable is not False:
            return [filled(self._exact.epoch(dataset, 0).cpu())]
        if (held := self._varying.get(dataset.digest)) is None:
            with seeded(derive(0, "asked")):
                held = [filled(self._exact.once(dataset).cpu()) for _ in range(ASKED)]
            self._varying[dataset.digest] = held
        return held

    def once(self, dataset: ViewDataset) -> Tensor:
        """Logits (N, K) for the first epoch of views, computed now."""
        compute = self._choose(lambda: self._first(dataset, 0))
        return self._make(dataset, 0, compute, dataset.samples.parts(PART))

    def _first(self, dataset: ViewDataset, epoch: int) -> Tensor:
        """The first views, on which compute settings are tried."""
        return to_float(dataset.show(epoch, dataset.samples.parts(PART)[0][:TRIED])[0].to(self.device))

    @cached_property
    def _exact(self) -> "RememberedAnswers":
        """The same network for measurements: bf16 rounds the two highest answers of a nasty one to equal numbers."""
        if self._asked == EXACT:
            return self
        return RememberedAnswers(self.network, EXACT, self.store, repeatable=self.repeatable)

    def _found_or_made(self, dataset: ViewDataset, epoch: int) -> Tensor:
        compute = self._choose(lambda: self._first(dataset, epoch))
        key = self._key(dataset, compute) if self.store.open else None
        parts = dataset.samples.parts(PART)
        if not distributed.all_true(key is not None) or key is None:
            return self._make(dataset, epoch, compute, parts)
        each = len(parts) if distributed.world() > 1 else max(math.ceil(len(parts) / BLOCKS), LEAST // PART)
        blocks = [parts[first : first + each] for first in range(0, len(parts), each)]
        shapes = [(sum(map(len, block)), dataset.num_classes) for block in blocks]
        return self.store.gather(key, epoch, shapes, lambda number: self._make(dataset, epoch, compute, blocks[number]))

    def _make(self, dataset: ViewDataset, epoch: int, compute: Compute, parts: Sequence[Tensor]) -> Tensor:
        def answers(parts: Sequence[Tensor]) -> Iterator[Tensor]:
            for views, _ in dataset.shows(epoch, parts):
                yield self._run(compute, to_float(views.to(self.device)))

        return require_finite(distributed.in_turns(parts, answers), "views")

    def _run(self, compute: Compute, images: Tensor) -> Tensor:
        self.computed += len(images)
        with torch.no_grad(), compute.active(images.device):
            answers: Tensor = self._ready(compute.laid_out(images))
        return answers

    def _choose(self, sample: Callable[[], Tensor]) -> Compute:
        """Compute settings, chosen on the first images."""
        if self._compute is None:
            folder = self.store.folder if self.store.open else None
            self._compute = autotune(self._asked, self.network, sample, steps=1, training=False, folder=folder)
            self._ready = self._compute.prepare(self.network)
        return self._compute

    def _key(self, dataset: ViewDataset, compute: Compute) -> str | None:
        """Key of everything on which answers depend, but for the epoch; None for code that lies in no file."""
        if self.identity is None:
            return None
        where = [*machine(self.device), torch.__version__, undistill.__version__]
        parts = [*self.identity, self._probe(dataset), dataset.digest, str(compute), *where, PART]
        return fingerprint(*parts)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of all parameters and buffers."""
        return weights_sha256(self.network)

    @cached_property
    def identity(self) -> list[str] | None:
        """Hashes of weights and code, and the architecture; None for code that lies in no file."""
        kinds = {type(module) for module in self.network.modules()}
        try:
            files = {inspect.getfile(kind) for kind in kinds if not kind.__module__.startswith("torch.")}
            code = sorted(program_sha256(Path(file)) for file in files)
        except (TypeError, OSError):
            return None
        return [self.weights_sha256, repr(self.network), *code]

    def _probe(self, dataset: ViewDataset) -> str:
        """Hash of the logits of two random images. Detects state outside weights and code, such as an attribute."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, *dataset.samples.images.shape[1:], generator=generator)
        with torch.no_grad(), EXACT.active(self.device):
            return _digest(self.network(images.to(self.device)))


def mean_answer(asked: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean probabilities of several answers (N, K) to the same images; one is left as it is."""
    if len(asked) == 1:
        return asked[0]
    return torch.stack([one.softmax(1) for one in asked]).mean(0).log().clamp_min(LOG_ZERO)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(bytes_of(values)).hexdigest()
