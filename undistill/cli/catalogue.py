"""The entries of `undistill list`."""

import inspect

from undistill.attacks.attack import Attack
from undistill.auditing.launchers import Launcher
from undistill.auditing.suites import SUITES
from undistill.core.errors import SpecError, unknown
from undistill.core.spec import Spec
from undistill.data.source import Source
from undistill.defences.defence import Defence
from undistill.models.model import Model
from undistill.victims.black_box import BlackBox

Entry = dict[str, str]

FAMILIES: dict[str, type[Spec]] = {
    "data": Source,
    "models": Model,
    "defences": Defence,
    "attacks": Attack,
    "launchers": Launcher,
    "victims": BlackBox,
}


def catalogue(kind: str | None = None) -> dict[str, list[Entry]]:
    """Entries by kind: name, spec with defaults, one sentence. `SpecError` for an unknown kind."""
    everything = {
        name: [_entry(spec) for _, spec in sorted(family.registry.items()) if spec.offered]
        for name, family in FAMILIES.items()
    }
    everything["suites"] = [
        {
            "name": name,
            "spec": name,
            "about": f"{suite.about} {', '.join(suite.attacks)}; students {', '.join(suite.students)}; {suite.tuning}",
        }
        for name, suite in SUITES.items()
    ]
    if kind is None:
        return everything
    if kind not in everything:
        raise SpecError(unknown("kind of thing to list", kind, everything))
    return {kind: everything[kind]}


def _entry(spec: type[Spec]) -> Entry:
    written = sorted(spec.model_fields.items(), key=lambda field: not field[1].is_required())
    fields = ", ".join(name if field.is_required() else f"{name}={field.default!r}" for name, field in written)
    about = (inspect.getdoc(spec) or "").split("\n\n")[0].replace("\n", " ")
    return {"name": spec.__name__, "spec": f"{spec.__name__}({fields})", "about": about}
