"""Damaged and hostile inputs, made by a seed: no traceback, no hang, no code executed, nothing outside touched."""

import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

from tests.fuzz import Guard, World, case, quick

IN_SUITE, CHUNK, ALL = 320, 40, 6000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses signals and limits of Linux")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    os.environ.setdefault("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return World.make(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def guard(world: World) -> Guard:
    return Guard(world.secret)


def run(seeds: range, world: World, guard: Guard, folder: Path) -> None:
    before = {path: path.read_bytes() for path in world.secret.rglob("*") if path.is_file()}
    problems = []
    with quick():
        for seed in seeds:
            place = folder / str(seed)
            place.mkdir()
            problems += case(seed, world, guard, place)
            shutil.rmtree(place)
    assert not problems, "\n".join(problems)
    assert {path: path.read_bytes() for path in world.secret.rglob("*") if path.is_file()} == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20, "kilobytes"


@pytest.mark.parametrize("first", range(0, IN_SUITE, CHUNK))
def test_a_few_hundred_bad_inputs(first: int, world: World, guard: Guard, tmp_path: Path) -> None:
    run(range(first, first + CHUNK), world, guard, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(IN_SUITE, ALL, 10 * CHUNK))
def test_thousands_of_bad_inputs(first: int, world: World, guard: Guard, tmp_path: Path) -> None:
    run(range(first, min(first + 10 * CHUNK, ALL)), world, guard, tmp_path)
