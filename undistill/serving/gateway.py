"""A gateway: responses before a model that stays where it is, and as it is. In the folder of its server lie:

upstream/                      what is known of the model, and the answers by which the responses were calibrated
gateway/request.json           what was named: the model, the data, the responses
gateway/response.safetensors   the calibrated responses
gateway/gateway.json           written last: the hash of the responses
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from undistill.core.errors import SpecError, StoreError
from undistill.core.files import read_json, sha256, write_json
from undistill.core.identity import fingerprint
from undistill.core.seeds import derive, seeded
from undistill.core.tensors import write_weights
from undistill.data.arrays import Images
from undistill.data.source import Source
from undistill.data.split import Data
from undistill.data.views import to_float
from undistill.defences.defence import Defence, ResponseDefence
from undistill.models.weights import largest_weights, load_weights
from undistill.runs.contact import Contact
from undistill.runs.folder import Record, claim
from undistill.serving.served import Served, findings_of_gateway, predict_of, width_of
from undistill.ship.graph import Shipped
from undistill.training.fit import Fit
from undistill.training.recipe import Recipe
from undistill.victims.answer import Answer, Form
from undistill.victims.black_box import Ask, Reading
from undistill.victims.protected import Answering, Protected, responses_of
from undistill.victims.victim import Victim


class Upstream(Answering):
    """The model behind a gateway, in the place of a network."""

    def __init__(self, victim: Victim) -> None:
        super().__init__()
        self.victim = victim

    @property
    def form(self) -> Form:
        return self.victim.form

    def answer(self, inputs: Tensor) -> Answer:
        return self.victim.answer(inputs)


class Live(Answering):
    """The same while it serves: every image is asked anew, and nothing is kept of it."""

    def __init__(self, ask: Ask, reading: Reading) -> None:
        super().__init__()
        self.ask, self.reading = ask, reading

    @property
    def form(self) -> Form:
        return self.reading.form

    def answer(self, inputs: Tensor) -> Answer:
        return self.reading(self.ask(inputs.cpu()))


def of_upstream(
    spec: str, defences: Sequence[str | Defence], data: Images, folder: Path, audit: Path | None = None
) -> Served:
    """A model behind responses. Validation images go through it once, and calibrate them.

    Args:
        spec: the model, such as "Http('http://127.0.0.1:9000')".
        defences: the responses, in the order in which they are applied.
        data: images on which the model works.
        folder: where all that is kept; the same request finds it again, and asks no more than whether it is the same.
        audit: an audit of the gateway.
    """
    found = [_response_of(one) for one in defences]
    if not found:
        raise SpecError("A gateway needs a response, such as --defence 'Sealed(levels=4)'.")
    upstream, folder = folder / "upstream", folder / "gateway"
    planned = Contact.planned(spec, data, upstream)
    if not planned.spec.any_image:
        raise SpecError(f"{planned.spec} answers recorded images alone; a gateway needs a model that answers any.")
    refers = {name: sha for one in found for name, sha in one.refers().items()}
    named = {name: planned.record[name] for name in ("model", "data", "data_sha256")}
    request = {"command": "gateway", **named, "defences": list(map(str, found)), "refers": refers}
    with _prepared(folder, request):
        contact = Contact.make(spec, data, upstream)
        victim, images = contact.victim(), contact.data()
        if victim.verify:  # the model that was calibrated is the one that will answer
            victim.verify()
        responses = [one.response(images.shape, images.num_classes).eval() for one in found]
        asked = Protected(Upstream(victim), responses)
        sealed = _calibrated(asked, found, images, folder)
        with torch.no_grad():
            shown = Shipped.of(asked, to_float(images.validation[torch.arange(min(2, len(images.validation)))].pixels))
    known = contact.known
    live = Live(contact.connected(), Reading(known.kind, known.form, known.order))
    shipped = Shipped(Protected(live, responses), shown.shown).eval().requires_grad_(False)
    return Served(
        title=str(contact.spec),
        classes=images.classes,
        shape=contact.shape,
        outputs=tuple(shipped.outputs),
        width=width_of(shipped, images.num_classes),
        predict=predict_of(shipped),
        reading=Source.parse(contact.record["data"]).reading,
        identity=fingerprint(contact.identity, request, sealed),
        audited=None if audit is None else findings_of_gateway(audit, images.num_classes),
        workers=contact.spec.workers,
    )


@contextmanager
def _prepared(folder: Path, request: Record) -> Iterator[None]:
    """Claim the folder; where nothing was finished in it, another request may have it afterwards."""
    with claim(folder, request):
        try:
            yield
        except BaseException:
            if not (folder / "gateway.json").exists():
                (folder / "request.json").unlink(missing_ok=True)
                (folder / "response.safetensors").unlink(missing_ok=True)
            raise


def _response_of(named: str | Defence) -> ResponseDefence:
    defence = Defence.from_user(named)
    if not isinstance(defence, ResponseDefence):
        raise SpecError(f"{defence} trains a network; before a model that stays as it is, only responses can stand.")
    if defence.calibrated_on == "training":
        raise SpecError(
            f"{defence} trains a network of its own on the owner's images; take one that needs answers alone, such as "
            "Sealed(levels=4)."
        )
    return defence


def _calibrated(network: Protected, defences: Sequence[ResponseDefence], data: Data, folder: Path) -> str:
    """Calibrate the responses of a network, or read them as they were calibrated; returns the hash of their file."""
    path, record = folder / "response.safetensors", read_json(folder / "gateway.json")
    if record is None:
        responses, fit = responses_of(network), Fit(Recipe(epochs=0), 0, torch.device("cpu"))
        with seeded(derive(0, "defence")), torch.no_grad():
            for number, (defence, response) in enumerate(zip(defences, responses, strict=True)):
                current = Protected(network.network, responses[:number]).eval()
                defence.check(current, data.split)
                defence.calibrate(response, current, data.split, fit)
        record = {"sha256": write_weights(path, network.responses.state_dict())}
        write_json(folder / "gateway.json", record)
    if not path.exists() or sha256(path, largest_weights(network.responses)) != record.get("sha256"):
        raise StoreError(f"{path} is not the file that was written here; remove {folder}, and start again.")
    load_weights(network.responses, path)
    return str(record["sha256"])
