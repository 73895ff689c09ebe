"""undistill: protect a classifier against distillation, audit it, and show the evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from undistill.api import audit, protect, train
    from undistill.attacks.attack import Attack
    from undistill.data.batches import Batch
    from undistill.data.source import Source
    from undistill.data.split import Data, Samples, Split
    from undistill.defences.defence import Defence
    from undistill.models.model import Model
    from undistill.runs.run import Run
    from undistill.runs.settings import Settings, TrainSettings
    from undistill.training.fit import Fit
    from undistill.training.recipe import Recipe
    from undistill.victims.oracle import Access, Oracle

_HOMES = {
    "api": ["audit", "protect", "train"],
    "attacks": ["Attack"],
    "data": ["Data", "Samples", "Source", "Split"],
    "data.batches": ["Batch"],
    "defences": ["Defence"],
    "models": ["Model"],
    "runs.run": ["Run"],
    "runs.settings": ["Settings", "TrainSettings"],
    "training.fit": ["Fit"],
    "training.recipe": ["Recipe"],
    "victims.oracle": ["Access", "Oracle"],
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
