"""The user's own Python: `path/to/file.py:name` or `package.module:name`.

Code runs only if the user named it in this very process (`trust`, which `Spec.from_user` calls
for what was typed or passed to the Python API). A run folder may *mention* code, but opening one never executes it.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from undistill.core.errors import ModelError, unknown
from undistill.core.files import sha256
from undistill.core.identity import program_sha256

_trusted: set[str] = set()


def is_code(text: str) -> bool:
    """Whether a spec's text refers to the user's code (`net.py:make(width=3)`), not to a library (`timm:resnet18`)."""
    return ":" in text.split("(")[0] and not text.strip().startswith("timm:")


def trust(text: str) -> None:
    """Allow the code that `text`, typed by the user, refers to."""
    if is_code(text):
        _trusted.add(_reference(text))


def trusted() -> list[str]:
    """Code that the user allowed, to be allowed in a worker process as well."""
    return sorted(_trusted)


def reference(function: Callable[..., Any]) -> str:
    """`file.py:name` of a function or class of the user's own; `ModelError` where another process could not find it."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    if file is None or not os.path.isfile(file) or not name.isidentifier():
        raise ModelError(
            f"{name} cannot be found again by a later process, which has to build the network anew. Put a function "
            "that makes it into a file, at the top level, and pass that function, or 'file.py:name'."
        )
    module = sys.modules.get(function.__module__)
    inside_package = module is not None and module.__name__ != "__main__" and bool(module.__package__)
    return f"{function.__module__}:{name}" if inside_package else f"{file}:{name}"


def load_code(text: str) -> Any:
    """The object called `name` in `file.py:name` or `module:name`; `ModelError` if that fails."""
    where, name = _reference(text).rsplit(":", 1)
    module = _module(text)
    if not hasattr(module, name):
        raise ModelError(unknown(f"object in {where}", name, vars(module)))
    return getattr(module, name)


def code_sha256(text: str) -> str:
    """SHA-256 of the program text to which `text` refers; `ModelError` where it lies in no file."""
    file = getattr(_module(text), "__file__", None)
    if file is None:
        raise ModelError(f"'{_reference(text)}' lies in no file, so that its changes could not be noticed.")
    return program_sha256(Path(file))


def is_current(text: str, recorded: str) -> bool:
    """Whether `recorded` is the hash of the code to which `text` refers.

    Records of earlier versions hold the hash of the file as it was, comments included.
    """
    file = getattr(_module(text), "__file__", None)
    return file is not None and recorded in (program_sha256(Path(file)), sha256(Path(file)))


def _reference(text: str) -> str:
    return text.split("(")[0].strip()


def _module(text: str) -> ModuleType:
    reference = _reference(text)
    if reference not in _trusted:
        raise ModelError(
            f"'{reference}' is code, and code named by a stored run is not executed on its own. "
            f"If you trust it, name it yourself: --model {reference}, or for a defence --defence {reference} "
            "(in Python: model=..., defences=[...])."
        )
    return _import(reference.rsplit(":", 1)[0])


def _import(where: str) -> ModuleType:
    """Like `python FILE` and `python -m MODULE`, with the file's or the current folder on the path."""
    is_file = where.endswith(".py")
    folder = os.path.dirname(os.path.realpath(where)) if is_file else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _import_file(Path(where)) if is_file else importlib.import_module(where)
    except FileNotFoundError:
        raise ModelError(f"There is no file {where}.") from None
    except (Exception, SystemExit) as error:
        raise ModelError(f"Importing {where} failed: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    script = sys.modules["__main__"]
    if (running := getattr(script, "__file__", None)) and os.path.realpath(running) == os.path.realpath(path):
        return script  # which would train again if it were imported
    name = "undistill_user_" + hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
