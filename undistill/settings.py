"""Settings of a command: a YAML file, overridden by `a.b=value` pairs."""

from pathlib import Path
from typing import Any

import yaml

from undistill.errors import SpecError


def read_settings(config: Path | None, pairs: list[str] | None, fast: bool) -> dict[str, Any]:
    """The settings of a YAML file, overridden by `a.b=value` pairs; `fast` leaves the engine to a trial."""
    engine = {"precision": "auto", "layout": "auto", "compile": "auto"}
    settings: dict[str, Any] = {}
    try:
        if config:
            settings = yaml.safe_load(config.read_text()) or {}
        if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
            raise SpecError(f"{config} must hold settings by name, such as 'seed: 1'.")
        for pair in pairs or ():
            key, equals, value = pair.partition("=")
            if not equals:
                raise SpecError(f"--set {pair} has no value; write --set key=value.")
            nested: Any = yaml.safe_load(value)
            for part in reversed(key.strip().split(".")):
                nested = {part: nested}
            settings = merge(settings, nested)
        if fast:
            settings = merge({"recipe": {"engine": engine}}, settings)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"Settings are not readable YAML: {' '.join(str(error).split())}") from None
    return settings


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, level by level."""
    both = dict(base)
    for key, value in over.items():
        below = both.get(key)
        both[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both
