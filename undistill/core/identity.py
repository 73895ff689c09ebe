"""Identity: hashes of plain values and of program text, of which the keys of stored results are made.

A key holds everything that changes a result and nothing else. So program text is hashed as its syntax tree: comments,
docstrings, layout and the wording of errors do not count, and neither do modules that a result does not import. The
key of a cell is `Job.key` in auditing/cell.py.
"""

import ast
import hashlib
import inspect
import json
import site
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "undistill"
SPEAKING = {PACKAGE / "core" / name for name in ("errors.py", "progress.py")}
"""Modules that only say something to the user."""


def fingerprint(*parts: object) -> str:
    """SHA-256 of plain values, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def program_sha256(file: Path) -> str:
    """SHA-256 of a Python file and of every module of the same author that it imports, directly or through others.

    Modules of the same author are those found beside the file or in its package. Libraries are left out.
    """
    file = file.resolve()
    return _own_sha256(file) if file.is_relative_to(PACKAGE) else _closure_sha256(file)


@cache
def _own_sha256(file: Path) -> str:
    """`program_sha256` of a module of this package, which is not read anew: what runs is what was imported."""
    return _closure_sha256(file)


def _closure_sha256(file: Path) -> str:
    roots, ours = _roots(file), file.is_relative_to(PACKAGE)
    found, todo = {file}, [file]
    while todo:
        imported = {module for module in _imports(todo.pop(), roots) if module.is_relative_to(PACKAGE) == ours}
        new = imported - found - SPEAKING
        found |= new
        todo += new
    return fingerprint(*sorted((_name(module, roots), _syntax(module)[0]) for module in found))


def source_sha256(kind: type) -> str:
    """SHA-256 of the program text of a class, without what the user's own code adds to it."""
    own = next(base for base in kind.__mro__ if base.__module__.startswith("undistill."))
    return program_sha256(Path(inspect.getfile(own)))


@cache
def package_sha256() -> str:
    """SHA-256 of the program text of this whole package, to tell revisions apart."""
    return fingerprint(*sorted((str(file.relative_to(ROOT)), _syntax(file)[0]) for file in PACKAGE.rglob("*.py")))


def _roots(file: Path) -> tuple[Path, ...]:
    """The folders in which the file's author keeps modules; none for a file of a library."""
    if file.is_relative_to(PACKAGE):
        return (ROOT,)
    libraries = {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib")}
    if any(file.is_relative_to(Path(folder).resolve()) for folder in libraries):
        return ()
    package = file.parent
    while (package / "__init__.py").exists() and package != package.parent:
        package = package.parent
    return tuple(dict.fromkeys((file.parent, package)))


def _name(file: Path, roots: tuple[Path, ...]) -> str:
    """Path of a module, written in the same way on every machine."""
    return next((file.relative_to(root).as_posix() for root in roots[::-1] if file.is_relative_to(root)), file.name)


def _imports(file: Path, roots: tuple[Path, ...]) -> Iterator[Path]:
    """The modules below `roots` that a file imports."""
    for level, module, name in _syntax(file)[1]:
        folders = (file.parents[level - 1],) if level else roots
        parts = [*module.split("."), name] if module else [name]
        for folder in folders:
            for place in (folder.joinpath(*parts), folder.joinpath(*parts[:-1])):
                for found in (place.with_suffix(".py"), place / "__init__.py"):
                    if found.is_file():
                        yield found.resolve()


Imported = tuple[int, str, str]
"""How many packages up, the module, and the name that is taken from it."""


def _syntax(file: Path) -> tuple[str, list[Imported]]:
    """The hash of a file's syntax tree, and what it imports. Files are read anew only when they changed."""
    about = file.stat()
    return _read(file, about.st_mtime_ns, about.st_size)


@cache
def _read(file: Path, changed: int, size: int) -> tuple[str, list[Imported]]:
    content = file.read_bytes()
    try:
        tree = ast.parse(content)
        return hashlib.sha256(_text(tree).encode()).hexdigest(), list(_imported(tree))
    except (SyntaxError, ValueError, RecursionError):  # no Python, or nested too deeply for us
        return hashlib.sha256(content).hexdigest(), []


def _imported(node: ast.AST) -> Iterator[Imported]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                module, _, name = alias.name.rpartition(".")
                yield 0, module, name
        elif isinstance(child, ast.ImportFrom):
            yield from ((child.level, child.module or "", alias.name) for alias in child.names)
        elif not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from _imported(child)


def _text(node: object) -> str:
    """A syntax tree as text that is the same in every version of Python, which add empty fields now and then."""
    if isinstance(node, list):
        return f"[{' '.join(_text(one) for one in node if not _is_docstring(one))}]"
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return f"Raise({_text(node.exc.func)})"  # without what the error says
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({' '.join(f'{name}={_text(value)}' for name, value in fields)})"
    return repr(node)


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
