"""Plug-ins: a new attack or defence is one new file, since every module of its package is imported."""

import importlib
import pkgutil
from collections.abc import Iterable


def import_all(path: Iterable[str], package: str) -> None:
    """Import every module below `package`, whose folders are `path`; their specs register themselves."""
    for module in pkgutil.walk_packages(path, f"{package}."):
        importlib.import_module(module.name)
