"""Where things stand: packages import those below them, never those above."""

import ast
from collections.abc import Iterator
from pathlib import Path

import undistill

ROOT = Path(undistill.__file__).parent
ORDER = [
    "core",
    "data",
    "models",
    "training",
    "victims",
    "defences",
    "attacks",
    "runs",
    "auditing",
    "report",
    "ship",
    "serving",
    "api",
    "papers",
    "cli",
]


def imported(file: Path) -> Iterator[str]:
    """The packages of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("undistill.") and name.count("."))


def test_imports_go_down() -> None:
    files = {file: file.relative_to(ROOT).with_suffix("").parts[0] for file in ROOT.rglob("*.py")}
    packages = {place for place in files.values() if place not in ("__init__", "__main__")}
    assert packages == set(ORDER), "a package without a place"
    up = [
        f"{file.relative_to(ROOT)} imports {other}"
        for file, place in files.items()
        if place in ORDER
        for other in imported(file)
        if other in ORDER and ORDER.index(other) > ORDER.index(place)
    ]
    assert not up, "\n".join(up)
