"""Damaged and hostile inputs, made by a seed: no traceback, no hang, no code executed, nothing outside touched."""

import faulthandler
import os
import resource
import sys

import pytest

from tests.fuzz import SECONDS, TARGETS, Guard, World, case, quick

IN_SUITE, CHUNK, ALL = 120, 40, 6000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses signals and limits of Linux")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    os.environ.setdefault("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return World.make(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def guard(world: World) -> Guard:
    return Guard(world.secret)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_not_changed_is_read(name: str, world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Else a case would end before it came to what it changes."""
    for command in TARGETS[name].commands:
        with quick():
            sandbox = world.sandbox()
            sandbox.run(*command)
        assert sandbox.code == (1 if "other bytes than published" in sandbox.said else 0), sandbox.said
        assert not sandbox.problems
    assert "damaged" not in caplog.text
    assert "not of this training" not in caplog.text


def run(seeds: range, world: World, guard: Guard) -> None:
    before = {path: path.read_bytes() for path in world.secret.rglob("*") if path.is_file()}
    memory, problems = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, list[str]()
    with quick():
        for seed in seeds:
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # a hang in native code, which no signal ends
            problems += case(seed, world, guard)
    faulthandler.cancel_dump_traceback_later()
    assert not problems, "\n".join(problems)
    assert {path: path.read_bytes() for path in world.secret.rglob("*") if path.is_file()} == before
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        assert resource.getrusage(who).ru_maxrss < memory + 1.5 * 2**20, "kilobytes"


@pytest.mark.parametrize("first", range(0, IN_SUITE, CHUNK))
def test_a_hundred_bad_inputs(first: int, world: World, guard: Guard) -> None:
    run(range(first, first + CHUNK), world, guard)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(IN_SUITE, ALL, 10 * CHUNK))
def test_thousands_of_bad_inputs(first: int, world: World, guard: Guard) -> None:
    run(range(first, min(first + 10 * CHUNK, ALL)), world, guard)
