"""A sealed network of the toy world, and servers that answer with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RECIPE
from tests.serving.server import running
from undistill.api import export, protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.serving.app import Server
from undistill.serving.served import Served, of_run


@pytest.fixture(scope="session")
def sealed(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("served") / "sealed"
    return protect(honest, "Sealed(levels=2)", out, settings=Settings(recipe=RECIPE), device="cpu")


@pytest.fixture(scope="session")
def exported(sealed: Run) -> Path:
    return export(sealed, sealed.folder.with_name("export"), format="onnx")


@pytest.fixture(scope="session")
def served(sealed: Run) -> Served:
    return of_run(sealed.folder, device="cpu")


@pytest.fixture
def up(served: Served, tmp_path: Path) -> Iterator[tuple[str, Server]]:
    with running(served, tmp_path) as found:
        yield found
