"""undistill: protect a classifier against distillation, audit it, and show the evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from undistill.api import adopt, audit, compare, export, protect, serve, train
    from undistill.attacks.attack import Attack, Buying, Distillation, Fresh, QueryAttack, Role, ThiefData, tries
    from undistill.data.batches import Batch
    from undistill.data.source import Source
    from undistill.data.split import Data, Samples, Split
    from undistill.defences.defence import Defence, ResponseDefence
    from undistill.models.model import Model
    from undistill.runs.run import Run
    from undistill.runs.settings import Settings, TrainSettings
    from undistill.training.fit import Fit
    from undistill.training.objectives import Weighted
    from undistill.training.optimisers import Extra
    from undistill.training.recipe import Recipe
    from undistill.victims.answer import Answer, Form
    from undistill.victims.black_box import BlackBox, Outputs
    from undistill.victims.ledger import Ledger
    from undistill.victims.oracle import Access, Oracle
    from undistill.victims.protected import Protected, Response
    from undistill.victims.victim import Victim

_HOMES = {
    "api": ["adopt", "audit", "compare", "export", "protect", "serve", "train"],
    "attacks.attack": ["Attack", "Buying", "Distillation", "Fresh", "QueryAttack", "Role", "ThiefData", "tries"],
    "data": ["Data", "Samples", "Source", "Split"],
    "data.batches": ["Batch"],
    "defences.defence": ["Defence", "ResponseDefence"],
    "models": ["Model"],
    "runs.run": ["Run"],
    "runs.settings": ["Settings", "TrainSettings"],
    "training.fit": ["Fit"],
    "training.objectives": ["Weighted"],
    "training.optimisers": ["Extra"],
    "training.recipe": ["Recipe"],
    "victims.answer": ["Answer", "Form"],
    "victims.black_box": ["BlackBox", "Outputs"],
    "victims.ledger": ["Ledger"],
    "victims.oracle": ["Access", "Oracle"],
    "victims.protected": ["Protected", "Response"],
    "victims.victim": ["Victim"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Access", "Answer", "Attack", "Batch", "BlackBox", "Buying", "Data", "Defence", "Distillation", "Extra", "Fit",
    "Form", "Fresh", "Ledger", "Model", "Oracle", "Outputs", "Protected", "QueryAttack", "Recipe", "Response",
    "ResponseDefence", "Role", "Run", "Samples", "Settings", "Source", "Split", "ThiefData", "TrainSettings",
    "Victim", "Weighted", "adopt", "audit", "compare", "export", "protect", "serve", "train", "tries",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `undistill --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'undistill' has no attribute '{name}'")
    return getattr(import_module(f"undistill.{_HOME[name]}"), name)
