"""undistill: protect a classifier against distillation, audit it, and show the evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from undistill.attacks import Attack
    from undistill.auditor import audit
    from undistill.data import Data, Samples, Source, Split
    from undistill.defences import Defence
    from undistill.fit import Fit
    from undistill.models import Model
    from undistill.oracle import Access, Oracle
    from undistill.recipe import Recipe
    from undistill.store import Run
    from undistill.stream import Batch
    from undistill.workflow import Settings, TrainSettings, protect, train

_HOMES = {
    "attacks": ["Attack"],
    "auditor": ["audit"],
    "data": ["Data", "Samples", "Source", "Split"],
    "defences": ["Defence"],
    "fit": ["Fit"],
    "models": ["Model"],
    "oracle": ["Access", "Oracle"],
    "recipe": ["Recipe"],
    "store": ["Run"],
    "stream": ["Batch"],
    "workflow": ["Settings", "TrainSettings", "protect", "train"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Access", "Attack", "Batch", "Data", "Defence", "Fit", "Model", "Oracle", "Recipe", "Run", "Samples",
    "Settings", "Source", "Split", "TrainSettings", "audit", "protect", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `undistill --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'undistill' has no attribute '{name}'")
    return getattr(import_module(f"undistill.{_HOME[name]}"), name)
