"""`Contact`: a black box that is audited, and where the answers that were bought of it lie.

request.json          what was named: the black box and the data
contact.json          what it turned out to be by its first answers: how they are read, whether they repeat
purchases.sqlite      every answer that was bought
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from undistill.core.errors import StoreError, UndistillError, VictimError, remark
from undistill.core.files import parse_json, read_text, write_json
from undistill.core.identity import fingerprint, source_sha256
from undistill.core.unshown import LOG_ZERO
from undistill.data.arrays import Images, stored
from undistill.data.split import Data, Samples
from undistill.data.views import to_float
from undistill.models.adapter import NORMALISATIONS, Adapter
from undistill.runs.folder import Record, claim
from undistill.runs.preprocessing import better_way, named_order
from undistill.runs.run import read_data
from undistill.runs.settings import Settings
from undistill.training.metrics import accuracy
from undistill.training.recipe import Recipe
from undistill.victims.answer import Answer, Form
from undistill.victims.black_box import Ask, BlackBox, Kind, Reading, in_parts, reading_of
from undistill.victims.endpoint import Endpoint, image_keys
from undistill.victims.purchases import Purchases

PROBES = 8  # images that are asked twice, and again by later commands before they buy
SAME = 1e-3  # largest difference of probabilities that rounding explains
LOOKED_AT = 64  # images by which it is seen whether the classifier is one of these images
MOST_LOOKED = 4 * PROBES + LOOKED_AT * (1 + len(NORMALISATIONS))
"""Answers that are bought at most to look at a black box, and to recognise it."""


class Found(BaseModel):
    """contact.json."""

    kind: Kind
    form: Form
    order: tuple[int, ...] = Field(min_length=2)
    repeatable: bool
    declared: str
    looked: bool = False
    """Whether it was seen that it is a model of these images."""
    probes: list[list[float]]
    """Its answers to the probes, as `Answer.to_served` writes them."""


@dataclass(frozen=True)
class Contact:
    """A black box beside the data on which it is audited. Its record has those fields of a run's that apply."""

    folder: Path
    spec: BlackBox
    record: Record
    found: Found | None = None
    """None until it was asked for the first time."""
    fresh: bool = False
    """Whether it was asked for the first time by this very command, so that it need not be recognised."""

    @classmethod
    def planned(cls, spec: str | BlackBox, data: Images, folder: Path) -> "Contact":
        """The black box as it is known before it is asked anything."""
        box = BlackBox.from_user(spec)
        source = stored(data, folder)
        loaded = source.load()
        box.order(loaded.classes)
        record = {
            "command": "contact",
            "data": str(source),
            "data_sha256": loaded.digest,
            "model": str(box.without_transport()),
            "classes": list(loaded.classes),
            "shape": list(loaded.shape),
            "refers": box.refers(),
            "train_images": len(loaded.train),
            "settings": Settings(recipe=Recipe(epochs=0)).model_dump(mode="json"),
            "seconds": 0.0,
        }
        return cls(folder, box, record, _read_found(folder / "contact.json", len(loaded.classes)))

    @classmethod
    def make(cls, spec: str | BlackBox, data: Images, folder: Path) -> "Contact":
        """Ask a black box for the first time, about a few images, or find what it answered then.

        Raises `VictimError` for one that does not answer, or not for these classes.
        """
        contact = cls.planned(spec, data, folder)
        fields = ("command", "data", "data_sha256", "model", "refers")
        with claim(folder, {name: contact.record[name] for name in fields}):
            known = contact.found
            if known and known.looked:
                return contact
            try:
                if known is None:
                    contact = replace(contact, found=contact._first_asked(), fresh=True)
                    write_json(folder / "contact.json", contact.known.model_dump(mode="json"))
                contact._look()
            except VictimError:  # who names it otherwise must not find answers that were bought in this way
                for name in ("contact.json", "request.json", "purchases.sqlite", "purchases.lock"):
                    (folder / name).unlink(missing_ok=True)
                raise
            contact = replace(contact, found=contact.known.model_copy(update={"looked": True}))
            write_json(folder / "contact.json", contact.known.model_dump(mode="json"))
        return contact

    def data(self) -> Data:
        """The data, read again and checked to be the same."""
        return read_data(self.record, self.folder)

    @property
    def known(self) -> Found:
        """Its properties as they were found, or until then as a plan assumes them."""
        return self.found or _nothing_known(len(self.record["classes"]))

    def require_validation(self) -> None:
        """Raise `VictimError` unless all validation images can be asked, on which a twin is compared with it."""
        samples = self.data().validation
        if lacking := len(samples) - len(self.spec.known(samples)):
            raise VictimError(
                f"{self.spec} lacks the answers to {lacking:,} of {len(samples):,} validation images, on which it is "
                "compared with its twin; leave out --honest."
            )

    def victim(self) -> Endpoint:
        """The black box, whose answers are bought once."""
        box, found = self.spec, self.known
        connect = cache(self.connected)  # not before something is bought: a finished audit needs no server
        endpoint = Endpoint(
            lambda images: connect()(images),
            Reading(found.kind, found.form, found.order),
            self.purchases,
            identity=self.identity,
            classes=tuple(self.record["classes"]),
            repeatable=found.repeatable,
            any_image=box.any_image,
            batch_size=box.batch_size,
            workers=box.workers,
        )
        if found.repeatable and not self.fresh and box.any_image:
            endpoint.verify = partial(self._require_same, endpoint, torch.tensor(found.probes))
        return endpoint

    def connected(self) -> Ask:
        """A way to ask about images in [0, 1]."""
        ask, adapter = self._connected(), self.spec.adapter
        return lambda images: ask(adapter.normalised(images))

    def _connected(self) -> Ask:
        """A way to ask about images as the black box wants them."""
        bought = self.purchases
        ask = self.spec.connect(self.shape, tuple(self.record["classes"]), lambda count: bought.bill("lost", count))
        return in_parts(ask, self.spec.batch_size)

    @property
    def purchases(self) -> Purchases:
        return Purchases(self.folder / "purchases.sqlite", len(self.record["classes"]))

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.record["shape"]
        return channels, height, width

    @property
    def digest(self) -> str:
        """Hash of what was named; there are no weights to be hashed."""
        return fingerprint(self.record["model"], self.record["refers"], self.record["data_sha256"])

    @property
    def identity(self) -> str:
        """Hash of what it is and declares, how it is read, and its answers to the probes."""
        return fingerprint(self.digest, self.found and self.found.model_dump(mode="json", exclude={"looked"}))

    @property
    def program(self) -> str:
        """Hash of our own program text behind it."""
        return fingerprint(source_sha256(type(self.spec)))

    @property
    def has_history(self) -> bool:
        """Nobody here knows on which images it was trained."""
        return True

    def _first_asked(self) -> Found:
        data, ask = self.data(), self.connected()
        if not self.spec.any_image:
            _require_recorded(self.spec, data)
        probes = to_float(_spread(data.test, PROBES).pixels)
        outputs = ask(probes)
        reading = reading_of(outputs, self.spec.output, self.spec.order(data.classes))
        served, repeatable = reading(outputs).to_served(), True
        if self.spec.any_image:
            backwards = reading(ask(probes.flip(0))).to_served().flip(0)
            self.purchases.bill("billed", len(probes))
            repeatable = _same(served, backwards)
        if repeatable:
            self.purchases.add(image_keys(probes), served)
        else:
            self.purchases.bill("billed", len(probes))
        return Found(
            kind=reading.kind,
            form=reading.form,
            order=reading.order,
            repeatable=repeatable,
            declared=self._declared(),
            probes=served.tolist(),
        )

    def _declared(self) -> str:
        """Hash of what it says of itself, which may hold anything."""
        return fingerprint(self.spec.declared())

    def _look(self) -> None:
        """Raise `VictimError` where another normalisation or order of classes would be clearly better."""
        data, found = self.data(), self.known
        samples = _spread(self.spec.known(data.train), LOOKED_AT)
        images = to_float(samples.pixels)
        right = accuracy(self.victim().answer(images, "look").filled, samples.labels)
        chance = max(torch.bincount(samples.labels).tolist()) / len(samples)
        if right >= chance + 0.1 * (1 - chance):
            return
        ask = self._connected()
        plain = Reading(found.kind, found.form, tuple(range(data.num_classes)))

        @cache
        def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
            try:
                tried = plain(ask(Adapter(mean=mean, std=std).normalised(images))).filled
            except VictimError:  # such as of a server that takes nothing but pictures
                return torch.zeros(len(images), data.num_classes)
            self.purchases.bill("billed", len(images))
            return tried

        def answers(adapter: Adapter) -> Tensor:
            tried = normalised(adapter.mean, adapter.std)
            return tried[:, adapter.order] if adapter.order else tried

        adapter = self.spec.adapter.model_copy(update={"order": found.order})
        best = better_way(answers, adapter, samples.labels, self.shape[0]) if self.spec.any_image else None
        if best is None:
            remark(f"{self.spec} is right for {right:.1%} of {len(samples)} images; is it a model of these classes?")
            return
        changed = {"preprocess": best.normalisation or self.spec.preprocess}
        if best.order != tuple(range(data.num_classes)):
            changed["classes"] = ",".join(named_order(best.order, data.classes))
        named = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise VictimError(
            f"{self.spec} is right for {right:.1%} of {len(samples)} images, and for {best.accuracy:.1%} with {named}; "
            f"write that into {type(self.spec).__name__}(...)."
        )

    def _require_same(self, endpoint: Endpoint, before: Tensor) -> None:
        """Raise `VictimError` if the probes are answered otherwise than when the first answers were bought."""
        now = endpoint.ask(to_float(_spread(self.data().test, PROBES).pixels))
        if not _same(before, now.to_served()) or self._declared() != self.known.declared:
            raise VictimError(
                f"{self.spec} no longer answers as it did when {self.purchases.path} was begun: it was replaced, or "
                "set up anew. Its earlier answers are kept there; audit it with another --out."
            )


def _require_recorded(spec: BlackBox, data: Data) -> None:
    lacking = len(data.test) - len(spec.known(data.test))
    known = len(spec.known(data.train))
    if lacking or known < 2 * data.num_classes:
        raise VictimError(
            f"{spec} lacks the answers to {lacking:,} of {len(data.test):,} test images, and has those to {known:,} of "
            f"{len(data.train):,} training images. An audit needs the former all, and of the latter at least "
            f"{2 * data.num_classes}."
        )
    if known < len(data.train):
        remark(f"Answers to {known:,} of {len(data.train):,} training images were recorded; thieves get no others.")


def _read_found(path: Path, classes: int) -> Found | None:
    if not path.exists():
        return None
    try:
        found = Found.model_validate(parse_json(read_text(path)))
        if len(found.order) == classes and all(len(row) == classes for row in found.probes):
            return found
        why = "it is about other classes"
    except (ValidationError, ValueError, UndistillError) as error:
        why = str(error).splitlines()[0]
    raise StoreError(f"{path} is damaged ({why}); remove {path.parent}, or name another --ledger.")


def _nothing_known(classes: int) -> Found:
    """Assumptions of a plan about a black box that was not asked yet."""
    return Found(
        kind="probabilities", form=Form.FULL, order=tuple(range(classes)), repeatable=True, declared="", probes=[]
    )


def _spread(samples: Samples, count: int) -> Samples:
    """`count` of the samples, spread evenly over them."""
    return samples[torch.linspace(0, len(samples) - 1, min(count, len(samples))).long()]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether answers (N, K) to the same images are the same but for rounding."""
    shown = [Answer.of_served(served).shown for served in (one, other)]
    p = [served.clamp_min(LOG_ZERO).exp() for served in (one, other)]
    return bool(torch.equal(*shown) and ((p[0] - p[1]).abs() <= SAME).all())
