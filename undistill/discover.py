"""A new attack or defence is one new file: every module of the package is imported, none is listed."""

import importlib
import pkgutil
from collections.abc import Iterable


def import_all(path: Iterable[str], package: str) -> None:
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
