"""`BlackBox`: a model that can be asked and not opened, as a spec. One file each, beside this one."""

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import field_validator
from torch import Tensor

from undistill.core.code import trust
from undistill.core.errors import SpecError, UndistillError, VictimError, unknown
from undistill.core.spec import Spec
from undistill.core.unshown import LOG_ZERO
from undistill.data.split import Samples
from undistill.models.adapter import NORMALISATIONS, Adapter
from undistill.victims.answer import Answer, Form

Kind = Literal["probabilities", "logits", "labels"]
FROM_ONE = 0.02  # that probabilities may sum to beside 1, since some interfaces round them
SHOWN = 3  # images whose outputs an error quotes


class Outputs(NamedTuple):
    """Raw outputs of a black box for B images."""

    values: Tensor | None
    """(B, K) for all classes, or (B, k) for the `classes` named; None where only labels were given."""
    classes: Tensor | None = None
    """(B, k) classes, counted from 0 in the order of the black box; None where all are there in their order."""


Ask = Callable[[Tensor], Outputs]
"""Asks about images (B, C, H, W) in [0, 1] at once. Raises `VictimError` for an answer that does not come."""


class BlackBox(Spec):
    """A model that answers images and shows nothing else of itself."""

    listed = False
    quiet: ClassVar[Sequence[str]] = ("output", "preprocess", "classes")
    billed: ClassVar[bool] = False
    """Whether somebody may be paid for answers, or limits them."""
    any_image: ClassVar[bool] = True
    """Whether it answers images that it was not given before, such as augmented views."""
    transport: ClassVar[Sequence[str]] = ()
    """Fields that say how it is asked and change no answer. They are in no key."""
    batch_size: ClassVar[int] = 512
    """Images that are asked at once."""
    workers: ClassVar[int] = 1
    """Requests that are under way side by side."""

    output: Literal["auto", "probabilities", "logits", "labels"] = "auto"
    """How its numbers are read; `auto` finds out by the first of them."""
    preprocess: str = "none"
    """How images are normalised before they are sent: none, imagenet, half, cifar10, mnist, 255, or an `Adapter(...)`
    with mean and std."""
    classes: str = ""
    """Its classes in the order in which it gives them, separated by commas; empty where that is the order of the
    data."""

    @field_validator("preprocess")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            adapter_of(value)
        except UndistillError as error:
            raise ValueError(str(error).rstrip(".")) from None
        return value

    @classmethod
    def from_user(cls, spec: "str | Self") -> Self:
        """As of other specs; code that it names may run as well."""
        found = super().from_user(spec)
        trust(found.code)
        return found

    @property
    def code(self) -> str:
        """Code of the user's own that is run to ask it, as `file.py:name`; empty where there is none."""
        return ""

    @abstractmethod
    def connect(self, shape: tuple[int, int, int], classes: tuple[str, ...], lost: Callable[[int], None]) -> Ask:
        """A way to ask it about images of that shape, already normalised. Raises `VictimError` if there is none.

        `lost` is told of images that may have been answered, and whose answers did not arrive.
        """

    def known(self, samples: Samples) -> Samples:
        """The subset of the samples about which it can be asked."""
        return samples

    def without_transport(self) -> Self:
        """The same black box, asked in the usual way."""
        kept = {name: value for name, value in self if name not in self.transport}
        return type(self)(**kept)

    def declared(self) -> str:
        """Its own description, such as name and version; a part of its identity."""
        return ""

    @property
    def adapter(self) -> Adapter:
        return adapter_of(self.preprocess)

    def order(self, classes: Sequence[str]) -> tuple[int, ...]:
        """Its output for each class of the data."""
        if not self.classes:
            return tuple(range(len(classes)))
        named = [name.strip() for name in self.classes.split(",")]
        if sorted(named) != sorted(classes):
            unlike = sorted(set(named) ^ set(classes)) or [name for name in named if named.count(name) > 1]
            raise SpecError(
                f"classes must name all {len(classes)} classes of the data once; see {', '.join(unlike[:SHOWN])}."
            )
        return tuple(named.index(name) for name in classes)


def is_black_box(text: str) -> bool:
    """Whether a text names a black box, such as `Onnx('model.onnx')`, and no folder."""
    return text.rstrip().endswith(")") and "(" in text and not os.path.exists(text)


def adapter_of(text: str) -> Adapter:
    """The adapter that a name of `NORMALISATIONS`, or an `Adapter(...)`, means."""
    if "(" in text:
        return Adapter.parse(text)
    if text not in NORMALISATIONS:
        raise SpecError(unknown("preprocessing", text, NORMALISATIONS))
    return NORMALISATIONS[text]


def in_parts(ask: Ask, size: int) -> Ask:
    """The same, with at most `size` images in a request."""

    def asked(images: Tensor) -> Outputs:
        values, classes = zip(*(ask(part) for part in images.split(size)), strict=True)
        return Outputs(*(None if column[0] is None else torch.cat(column) for column in (values, classes)))

    return asked


class Reading(NamedTuple):
    """How outputs become answers."""

    kind: Kind
    form: Form
    order: tuple[int, ...]
    """The output for each class of the data."""

    def __call__(self, outputs: Outputs) -> Answer:
        """The answer (B, K); `VictimError` for outputs that are none of this kind."""
        try:
            return self._read(outputs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:  # of shapes that no one foresaw
            raise VictimError(
                f"The black box answers what cannot be read ({str(error).splitlines()[0]:.200})."
            ) from None

    def _read(self, outputs: Outputs) -> Answer:
        values, classes = outputs
        if (classes is None) != (self.form == Form.FULL) or (values is None) != (self.kind == "labels"):
            raise VictimError("The black box changed the form of its answers in the middle; ask whoever runs it.")
        size = len(self.order)
        if classes is not None and (classes.ndim != 2 or classes.min() < 0 or classes.max() >= size):
            raise VictimError(f"The black box names classes {_some(classes)}; there are {size}, counted from 0.")
        if values is None:
            assert classes is not None
            log_p = torch.full((len(classes), size), LOG_ZERO).scatter(1, classes[:, :1], 0.0)
            shown = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, classes[:, :1], True)
            return self._ordered(log_p, shown)
        require_numbers(values)
        if classes is not None and values.shape != classes.shape:
            raise VictimError(f"The black box names {tuple(classes.shape)} classes for {tuple(values.shape)} numbers.")
        if classes is None:
            if values.ndim != 2 or values.shape[1] != size:
                raise VictimError(wrong_size(values, size))
            log_p = F.log_softmax(values.float(), 1) if self.kind == "logits" else _logs(values, whole=True)
            return self._ordered(log_p.clamp_min(LOG_ZERO), torch.ones_like(log_p, dtype=torch.bool))
        log_p = torch.full((len(values), size), LOG_ZERO).scatter(1, classes, _logs(values, whole=False))
        shown = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, classes, True)
        return self._ordered(log_p, shown)

    def _ordered(self, log_p: Tensor, shown: Tensor) -> Answer:
        order = torch.tensor(self.order)
        return Answer(log_p[:, order], shown[:, order], whole=bool(shown.all()))


def reading_of(outputs: Outputs, asked: str, order: tuple[int, ...]) -> Reading:
    """How the first outputs of a black box are to be read, if the user `asked` for 'auto'; else as he says."""
    values, classes = outputs
    if values is None:
        return Reading("labels", Form.LABEL, order)
    require_numbers(values)
    if classes is not None:
        return Reading("probabilities", Form.TOP, order)
    if values.ndim != 2 or values.shape[1] != len(order):
        raise VictimError(wrong_size(values, len(order)))
    if asked == "labels":
        raise VictimError("The black box gives numbers for every class, and output='labels' was named; leave it out.")
    if asked != "auto":
        return Reading("logits" if asked == "logits" else "probabilities", Form.FULL, order)
    sums = values.sum(1)
    if (values >= 0).all() and ((sums - 1).abs() <= FROM_ONE).all():
        return Reading("probabilities", Form.FULL, order)
    if (values >= 0).all() and (values <= 1).all():
        raise VictimError(
            f"The black box answers numbers from 0 to 1 whose sums are {_some(sums)}: no probabilities of classes that "
            "exclude each other. If they are logits, say so: output='logits'."
        )
    return Reading("logits", Form.FULL, order)


def require_numbers(values: Tensor) -> None:
    """Raise `VictimError` for NaN and infinity."""
    if not values.isfinite().all():
        raise VictimError("The black box answers NaN or infinity; whoever runs it has to mend that.")


def wrong_size(values: Tensor, size: int) -> str:
    if values.ndim != 2:
        return f"The black box answers numbers of the shape {tuple(values.shape)}, and (images, {size}) is needed."
    return (
        f"The black box answers {values.shape[1]} classes, and the data has {size}; name the data on which it works, "
        "or another output."
    )


def _logs(p: Tensor, *, whole: bool) -> Tensor:
    """Log-probabilities of shares that sum to 1, or to no more where they are not the `whole`."""
    p = p.double()
    sums = p.sum(1, keepdim=True)
    off = (sums - 1).abs() if whole else sums - 1
    if (p < 0).any() or (off > FROM_ONE).any():
        right = "1" if whole else "at most 1"
        raise VictimError(
            f"The black box answers probabilities whose sums are {_some(sums)}; they must sum to {right}. If they are "
            "logits, say so: output='logits'."
        )
    return (p / sums if whole else p).log().clamp_min(LOG_ZERO).float()


def _some(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten()[:SHOWN].tolist())
