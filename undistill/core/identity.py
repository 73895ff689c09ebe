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
    """`program_sha256` of a module of this package, read once in a process: an edit changes nothing that runs."""
    return _closure_sha256(file)


def _closure_sha256(file: Path) -> str:
    # Our modules follow our own alone, installed beside libraries or not; the user's never follow ours.
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
    except (SyntaxError, ValueError, RecursionError):  # Python itself will refuse it, if it is ever imported
        return hashlib.sha256(content).hexdigest(), []


def _imported(tree: ast.AST) -> Iterator[Imported]:
    todo = [tree]  # no recursion, here and below: a sum of hundreds of terms is nested as deeply
    while todo:
        for child in ast.iter_child_nodes(todo.pop()):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    module, _, name = alias.name.rpartition(".")
                    yield 0, module, name
            elif isinstance(child, ast.ImportFrom):
                yield from ((child.level, child.module or "", alias.name) for alias in child.names)
            elif not _is_for_types(child):
                todo.append(child)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


class _Written(str):
    """A piece of text that is finished, beside nodes that are still to be written."""


def _text(tree: ast.AST) -> str:
    """A syntax tree as text that is the same in every version of Python, which add empty fields now and then."""
    written: list[str] = []
    todo: list[object] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, _Written):
            written.append(node)
        else:
            todo += reversed(_pieces(node))
    return "".join(written)


def _pieces(node: object) -> list[object]:
    """A node as finished text and the nodes between."""
    if isinstance(node, list):
        parts: list[object] = [_Written("[")]
        for one in node:
            if not _is_docstring(one):
                parts += [one, _Written(" ")]
        return [*parts[: max(len(parts) - 1, 1)], _Written("]")]
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return [_Written("Raise("), node.exc.func, _Written(")")]  # without what the error says
    if isinstance(node, ast.AST):
        parts = [_Written(f"{type(node).__name__}(")]
        for name, value in ast.iter_fields(node):
            if value is not None and value != []:
                parts += [_Written(f"{name}="), value, _Written(" ")]
        return [*parts[: max(len(parts) - 1, 1)], _Written(")")]
    return [_Written(repr(node))]


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
