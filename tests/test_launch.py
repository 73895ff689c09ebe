"""Every launcher gives the same cells; lost workers and killed audits cost time alone."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import NASTY, RECIPE, STUDENT, TEACHER
from tests.test_kill import ENDINGS, ENVIRONMENT, finish, kill_when, start, wait_for
from undistill.api import audit
from undistill.auditing.cell import Job
from undistill.auditing.launchers import Crew, Death, Launcher, Pool, Ray, Serial
from undistill.auditing.measure import SIDES
from undistill.auditing.order import Order
from undistill.auditing.pair import RECENT, VictimPair
from undistill.auditing.plan import Plan
from undistill.auditing.schema import Side
from undistill.core.errors import LaunchError, ModelError, SpecError
from undistill.core.progress import PROGRESS_FILE, Board, Progress, Reporter
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings, TrainSettings
from undistill.runs.train import train
from undistill.training.compute import EXACT, Compute
from undistill.training.recipe import Recipe

MINE = '''
import os
import signal
from pathlib import Path

import torch

from undistill import Access, Attack
from undistill.core.errors import ModelError


class Marked(Attack):
    """Imitates; on its way it does `deed` if the file `marker` is not there, and leaves one."""

    needs = Access.QUERY
    marker: str = ""
    deed: str = "none"

    def run(self, oracle, fresh, data, fit):
        marker = Path(self.marker)
        if self.deed == "crash in bf16" and fit.recipe.compute.precision == "bf16":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.deed == "exit":
            raise SystemExit(3)
        if self.deed in ("die", "die once", "refuse") and not marker.exists():
            if self.deed == "die once":
                marker.touch()
            if self.deed == "refuse":
                raise ModelError("this attack refuses")
            os.kill(os.getpid(), signal.SIGKILL)

        if self.deed == "crash in bf16":
            fit.show(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))

        def objective(network, batch):
            return {"match": (network(batch.images) - oracle(batch).log_p).abs().mean()}

        return fit(fresh(), data, objective)
'''


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str], str]:
    """The text of an attack of the user's own, which does a deed."""
    (tmp_path / "mine.py").write_text(MINE)

    def text(deed: str) -> str:
        return f"{tmp_path / 'mine.py'}:Marked(marker='{tmp_path / 'marker'}', deed='{deed}')"

    return text


def jobs(victim: Run, attack: str, recipe: Recipe = RECIPE, sides: Sequence[Side] = ("victim",)) -> list[Job]:
    """On each side a cell of one of our attacks, and one of `attack`."""
    planned = Plan.of([VictimPair.of(victim, None, [0], None)], "quick-2", [attack], [STUDENT], recipe).jobs
    chosen = "HardLabels", "Marked"
    return [job for job in planned if type(job.attack).__name__ in chosen and job.side in sides]


def cells(
    victim: Run, out: Path, launcher: Launcher, attack: str, sides: Sequence[Side] = ("victim",)
) -> list[dict[str, object]]:
    done = launcher.run(jobs(victim, attack, sides=sides), out / "cells", Progress.silent())
    return [cell.model_dump(exclude={"seconds"}) for cell in done]


def test_a_pool_gives_the_same_cells_with_the_users_code_though_a_worker_is_lost(
    victim: Run, tmp_path: Path, mine
) -> None:
    done = cells(victim, tmp_path / "pool", Pool(workers=2), mine("die once"), sides=SIDES)
    assert (tmp_path / "marker").exists(), "a worker died"
    assert done == cells(victim, tmp_path / "serial", Serial(), mine("die once"), sides=SIDES)
    assert not list((tmp_path / "pool" / "cells").glob("*/")), "finished cells leave no folder behind"


def test_workers_stay_for_the_next_run_and_end_with_the_last(
    victim: Run, tmp_path: Path, mine, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = list[Any](), Crew._start
    monkeypatch.setattr(Crew, "_start", lambda crew, number: started.append(start(crew, number)) or started[-1])
    pool, place = Pool(workers=3), tmp_path / "cells"
    one, other = jobs(victim, mine("none"))
    with pool.ready():
        for job in (one, other):
            pool.run([job], place, Progress.silent())
        assert len(started) == 1, "and no more than there is work for"
    assert started[0].process.exitcode == 0
    pool.run([one, other], place, Progress.silent())
    assert len(started) == 1, "none to read what is there"


def test_a_worker_keeps_the_latest_pairs_only(victim: Run) -> None:
    """A comparison of twenty defences must not end with twenty victims and data sets in every worker."""
    pairs = [VictimPair.of(victim, None, (seed,), None) for seed in range(RECENT + 1)]
    sent = [pickle.loads(pickle.dumps(pair)) for pair in pairs]
    again = [pickle.loads(pickle.dumps(pair)) for pair in reversed(pairs)]
    assert [one is other for one, other in zip(sent, reversed(again), strict=True)] == [False] + [True] * RECENT


def test_workers_that_always_die_end_it(victim: Run, tmp_path: Path, mine) -> None:
    with pytest.raises(LaunchError, match=r"SIGKILL, .* lack of memory, 3 times in a row.*workers=1.*cells are kept"):
        cells(victim, tmp_path / "a", Pool(workers=1), mine("die"))
    assert list((tmp_path / "a" / "cells").glob("*.json"))


def test_after_a_fault_the_cells_of_a_group_are_done_one_by_one(
    victim: Run, tmp_path: Path, mine, caplog: pytest.LogCaptureFixture
) -> None:
    """The one whose settings crash is computed exactly, the others as they were asked for."""
    recipe = RECIPE.model_copy(update={"compute": Compute(precision="bf16")})
    wanted = list(reversed(jobs(victim, mine("crash in bf16"), recipe)))  # the one that crashes first
    found = Pool(workers=1, stacked=8).run(wanted, tmp_path / "cells", Progress.silent())
    assert "ended with SIGSEGV, a fault in native code; its cells are done again one by one" in caplog.text
    assert [cell.compute == str(EXACT) for cell in found] == ["Marked" in job.name for job in wanted]


def test_a_fault_in_native_code_is_named_and_the_exact_engine_tried(
    victim: Run, tmp_path: Path, mine, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = RECIPE.model_copy(update={"compute": Compute(precision="bf16")})

    def job(deed: str) -> list[Job]:
        return [one for one in jobs(victim, mine(deed), recipe) if "Marked" in one.name]

    place = tmp_path / "a" / "cells"
    (cell,) = Pool(workers=1).run(job("crash in bf16"), place, Progress.silent())
    assert cell.compute == str(EXACT)
    assert "ended with SIGSEGV, a fault in native code; its cell is done again with exact compute" in caplog.text
    (sheet,) = place.glob("*.png")
    assert [path.stem for path in place.glob("*.json")] == [sheet.stem], "found by the cell's name"
    assert not list(place.glob("*/")), "finished cells leave no folder behind"
    order = Order.of(job("none"), place, 1)
    again = Pool()._again(order, Death(-signal.SIGABRT), lost=1)
    assert again == replace(order, exact=True)
    with pytest.raises(
        LaunchError, match=r"SIGABRT, a fault in native code, with exact compute settings as well.*Try others"
    ):
        Pool()._again(again, Death(-signal.SIGABRT), lost=2)


def test_an_error_in_a_cell_is_the_same_error(victim: Run, tmp_path: Path, mine) -> None:
    with pytest.raises(ModelError, match=r"^this attack refuses$"):
        cells(victim, tmp_path / "a", Pool(workers=1), mine("refuse"))
    assert list((tmp_path / "a" / "cells").glob("*.json"))


def made_in(out: Path, toy_file: Path, epochs: int) -> Run:
    """A victim whose students take some time."""
    recipe = RECIPE.model_copy(update={"epochs": epochs, "batch_size": 8})
    honest = train(str(toy_file), TEACHER, out / "honest", settings=TrainSettings(recipe=recipe), device="cpu")
    return protect(honest, NASTY, out / "victim", settings=Settings(recipe=recipe), device="cpu")


@pytest.fixture(scope="module")
def slow_pair(toy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Students take long enough to be killed."""
    return made_in(tmp_path_factory.mktemp("slow"), toy_file, 12)


@pytest.fixture(scope="module")
def whole(slow_pair: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The report of an audit that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "audit"
    finish(*words(slow_pair, out))
    return report_of(out)


ALONE = "--launcher", "pool", "--workers", 1
"""One worker, beside Python's process that looks after what processes share."""


def words(victim: Run, out: Path, *launcher: object) -> list[object]:
    return ["audit", victim.folder, "--student", STUDENT, "--seeds", 1, "--device", "cpu", "--out", out, *launcher]


def report_of(out: Path) -> dict[str, object]:
    """report.json without measured times and where it was made."""
    report = json.loads((out / "report.json").read_text())
    for cell in [*report["cells"], *report["trials"]]:
        del cell["seconds"]
    for measured in ("ms_per_query_victim", "ms_per_query_honest"):
        del report["costs"][measured]
    return {name: value for name, value in report.items() if name != "environment"}


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_an_audit_that_is_killed_within_its_first_cell_and_a_later_one_ends_alike(
    slow_pair: Run, whole: dict[str, object], tmp_path: Path
) -> None:
    asked = words(slow_pair, tmp_path / "killed")
    kill_when(start(*asked), tmp_path / "killed", "cells/*/checkpoint-0.pt")
    assert not list((tmp_path / "killed").glob("cells/*.json"))
    process = start(*asked)
    wait_for(process, tmp_path / "killed", "cells/*.json")
    kill_when(process, tmp_path / "killed", "cells/*/checkpoint-0.pt")
    finish(*asked)
    assert report_of(tmp_path / "killed") == whole


def test_a_killed_pool_leaves_no_workers_and_is_resumed(
    slow_pair: Run, whole: dict[str, object], tmp_path: Path
) -> None:
    """By a launcher of another kind: what is done, and what is half done, is the same to all."""
    process = start(*words(slow_pair, tmp_path / "killed", "--launcher", "pool", "--workers", 2))
    wait_for(process, tmp_path / "killed", "cells/*/checkpoint-0.pt")
    workers = workers_of(process)
    assert len(workers) >= 2
    kill_when(process, tmp_path / "killed", "cells/*.json")
    assert_gone(workers)
    finish(*words(slow_pair, tmp_path / "killed"))
    assert report_of(tmp_path / "killed") == whole


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_signal_ends_a_pool_and_its_workers(number: signal.Signals, slow_pair: Run, tmp_path: Path) -> None:
    """With one sentence, and nothing that Python finds left over."""
    code, said = ENDINGS[number]
    process = start(*words(slow_pair, tmp_path / "a", *ALONE), stderr=subprocess.PIPE, session=True)
    wait_for(process, tmp_path / "a", "cells/*/checkpoint-0.pt")
    workers = workers_of(process)
    if number == signal.SIGINT:  # a terminal sends it to all
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.stderr is not None
    lines = process.stderr.read().decode().strip().splitlines()
    assert lines[-1] == f"Error: {said}. The same command goes on from here."
    assert not [line for line in lines[:-1] if not re.match(r"\w+ on \w+, seed \d+: |audit: |Plan: ", line)], lines
    assert process.wait() == code
    assert_gone(workers)


@pytest.mark.parametrize("patience", [0.0, 1.0])
def test_workers_end_with_their_parent_even_while_they_import(patience: float, slow_pair: Run, tmp_path: Path) -> None:
    process = start(*words(slow_pair, tmp_path / "a", *ALONE))
    while len(workers := workers_of(process)) < 2:
        assert process.poll() is None, "it ended too early"
        time.sleep(0.01)
    time.sleep(patience)
    process.kill()
    process.wait()
    assert_gone(workers)


def assert_gone(pids: list[int]) -> None:
    """All of them end within a minute, which a busy machine may need."""
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)


def test_a_board_shows_what_workers_report(tmp_path: Path) -> None:
    shown = []

    class Shows(Progress):
        def task(self, name: str, total: int, done: int = 0, units: int = 1):  # type: ignore[no-untyped-def]
            shown.append(("begins", name, total, units))
            return super().task(name, total, done, units)

    (tmp_path / "cell").mkdir()
    with Board(Shows(None), tmp_path) as board:
        with Reporter(tmp_path / "cell").task("SoftLabels", 9, units=3) as task:
            task.advance("loss 1")
        board.look()
        board.look()
        (tmp_path / "cell" / PROGRESS_FILE).write_text('{"na')
        board.look()
        assert shown == [("begins", "SoftLabels", 9, 3)]
        (tmp_path / "cell" / PROGRESS_FILE).unlink()
        board.look()
        assert not board._tasks


def test_what_strangers_planted_as_reports_is_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cell").mkdir()
    report = {"name": "[/b]\x1b]0;owned\x07", "total": 3, "done": 3, "note": "[red]"}
    (tmp_path / "cell" / PROGRESS_FILE).write_text(json.dumps(report))
    for terminal in (True, False):
        with Progress(Console(force_terminal=terminal)) as progress, Board(progress, tmp_path) as board:
            board.look()
    shown = capsys.readouterr().out
    assert "[/b]" in shown
    assert "owned" in shown
    assert "\x1b]0" not in shown


def test_a_cell_that_calls_exit_is_named(victim: Run, tmp_path: Path, mine) -> None:
    with pytest.raises(LaunchError, match=r"may not call sys\.exit"):
        cells(victim, tmp_path / "a", Pool(workers=1), mine("exit"))


def test_bad_launchers_are_explained(victim: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'Pool'"):
        audit(victim, tmp_path / "a", launcher="Pol")
    with pytest.raises(SpecError, match="workers = 0 is refused"):
        audit(victim, tmp_path / "a", launcher="Pool(workers=0)")
    assert not (tmp_path / "a").exists()


def test_ray_that_is_not_installed_is_named(victim: Run, tmp_path: Path, mine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LaunchError, match=r"pip install 'undistill\[ray\]'"):
        cells(victim, tmp_path / "a", Ray(), mine("none"))


@pytest.mark.ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "auto"])
def test_a_cluster_that_does_not_answer_is_named(address: str, victim: Run, tmp_path: Path, mine) -> None:
    """Tested before there is a cluster here, which `auto` would find."""
    pytest.importorskip("ray")
    with pytest.raises(LaunchError, match=r"No Ray cluster answers at.*Nothing was lost"):
        cells(victim, tmp_path / "a", Ray(address=address), mine("none"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two workers of one core each, beside a head that does no work."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ |= ENVIRONMENT
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield made
    made.shutdown()


@pytest.mark.ray
def test_ray_gives_the_same_report_though_a_worker_is_lost(toy_file: Path, cluster, tmp_path: Path) -> None:
    victim = made_in(tmp_path, toy_file, 100)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    process = start(*words(victim, tmp_path / "ray", "--launcher", "ray", "--address", cluster.address))
    wait_for(process, tmp_path / "ray", "cells/*.json")
    while len(list((tmp_path / "ray" / "cells").glob("*/checkpoint-0.pt"))) < 2:
        assert process.poll() is None, "both nodes were never in the middle of a cell"
        time.sleep(0.01)
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert process.wait(300) == 0
    assert start(*words(victim, tmp_path / "serial")).wait() == 0
    assert report_of(tmp_path / "ray") == report_of(tmp_path / "serial")


@pytest.mark.ray
def test_ray_runs_the_users_code_and_its_errors(victim: Run, cluster, tmp_path: Path, mine) -> None:
    cluster.add_node(num_cpus=1)
    where = Ray(address=cluster.address)
    with pytest.raises(ModelError, match=r"^this attack refuses$"):
        cells(victim, tmp_path / "a", where, mine("refuse"))
    done = cells(victim, tmp_path / "a", where, mine("die once"))
    assert (tmp_path / "marker").exists(), "a worker died"
    assert done == cells(victim, tmp_path / "serial", Serial(), mine("die once"))
