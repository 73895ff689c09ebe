"""Settings of a command: a YAML file, overridden by `a.b=value` pairs."""

import logging
from pathlib import Path
from typing import Any

import yaml

from undistill.core.errors import SpecError
from undistill.core.files import MIB, read_text

log = logging.getLogger(__name__)

DEEPEST = 20


class _Plain(yaml.SafeLoader):
    """Plain YAML alone: tags and aliases, of which a few hundred bytes can become gigabytes, are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise SpecError("Settings hold a YAML alias or anchor (& or *); write the value out.")
        if getattr(event, "tag", None):
            raise SpecError(
                f"Settings hold the YAML tag {event.tag[:60]!r}; write plain numbers, text, lists and names."
            )
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > DEEPEST:
            raise SpecError(f"Settings are nested more than {DEEPEST} levels deep.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_settings(config: Path | None, pairs: list[str] | None, fast: bool) -> dict[str, Any]:
    """The settings of a YAML file, overridden by `a.b=value` pairs; `fast` leaves the compute settings to a trial."""
    compute = {"precision": "auto", "layout": "auto", "compile": "auto"}
    settings: dict[str, Any] = _read(config) if config else {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise SpecError(f"--set {pair} has no value; write --set key=value.")
        names = key.strip().split(".")
        if len(names) > DEEPEST:
            raise SpecError(f"Settings are nested more than {DEEPEST} levels deep.")
        nested: Any = _parse(value)
        for name in reversed(names):
            nested = {name: nested}
        settings = merge(settings, nested)
    _say_new_names(settings)
    return merge({"recipe": {"compute": compute}}, settings) if fast else settings


def _say_new_names(settings: dict[str, Any]) -> None:
    """Rename what earlier versions called differently, and say so in one line."""
    recipe = settings.get("recipe")
    if isinstance(recipe, dict) and "engine" in recipe:
        log.warning("The setting recipe.engine is now called recipe.compute; the old name is accepted in this version.")
        recipe["compute"] = merge(recipe.pop("engine"), recipe.get("compute", {}))


def _read(config: Path) -> dict[str, Any]:
    try:
        settings = _parse(read_text(config, MIB)) or {}
    except UnicodeDecodeError:
        raise SpecError(f"{config} is not UTF-8 text; settings are a YAML file.") from None
    if not isinstance(settings, dict):
        raise SpecError(f"{config} must hold settings by name, such as 'seed: 1'.")
    return settings


def _parse(text: str) -> Any:
    try:
        value = yaml.load(text, _Plain)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise SpecError(f"Settings are not readable YAML: {' '.join(str(error).split())[:300]}") from None
    _require_names(value)
    return value


def _require_names(value: Any) -> None:
    """Raise `SpecError` for a setting whose name is no text."""
    if isinstance(value, dict):
        for name, held in value.items():
            if not isinstance(name, str):
                raise SpecError(f"Settings must go by name, such as 'seed: 1'; one is called {name!r:.60}.")
            _require_names(held)
    elif isinstance(value, list):
        for held in value:
            _require_names(held)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, level by level."""
    both = dict(base)
    for key, value in over.items():
        below = both.get(key)
        both[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both
