"""Native code that crashes, hangs or fills memory takes a child process with it, not the work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import STUDENT
from undistill.core.child import death, in_child, is_native_fault
from undistill.core.errors import ModelError
from undistill.core.files import seal, write_json
from undistill.models import Model
from undistill.training import autotune as trials
from undistill.training.autotune import autotune, known_fault
from undistill.training.compute import EXACT, FAST, Compute

linux = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone")
tried_in_a_child = pytest.mark.skipif(not trials.may_fork(), reason="trials run in a child where there is no GPU")
IMAGES = torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return Model.parse(STUDENT).build((1, 12, 12), 3, seed=1)


@linux
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL])
def test_a_child_that_dies_is_named_by_its_signal(number: signal.Signals) -> None:
    assert number.name in in_child(lambda: os.kill(os.getpid(), number) or "not reached")
    assert is_native_fault(-number) == (number != signal.SIGKILL)


@linux
def test_a_child_answers_or_is_stopped() -> None:
    assert in_child(lambda: "said") == "said"
    assert in_child(lambda: f"{torch.get_num_threads()} thread, {torch.rand(9, 9).mm(torch.rand(9, 9)).sum() > 0}") == (
        "1 thread, True"
    )
    began = time.monotonic()
    assert in_child(lambda: time.sleep(60) or "", seconds=0.2) == "no end after 0 seconds"
    # more than other tests of this process may have freed, and the allocator kept
    assert in_child(lambda: str(len(bytearray(2**32))), memory=2**28) == "exit code 1"
    assert time.monotonic() - began < 20


HOLDS = """
import os, sys, time
from undistill.core.child import in_child
in_child(lambda: open(sys.argv[1], "w").write(str(os.getpid())) and "" or time.sleep(60) or "")
"""


@linux
def test_a_child_ends_with_its_parent_and_holds_nothing_of_his_open(tmp_path: Path) -> None:
    """Whoever waits at the end of a pipe would else never learn of the parent's death."""
    reader, writer = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "pid")], pass_fds=[writer])
    os.close(writer)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    assert os.read(reader, 1) == b"", "the pipe is closed at once"
    time.sleep(0.5)
    assert not Path("/proc", (tmp_path / "pid").read_text(), "cwd").exists()


def test_how_a_process_ended_in_words() -> None:
    assert death(-signal.SIGSEGV) == "SIGSEGV, a fault in native code"
    assert death(-signal.SIGKILL) == "SIGKILL, most likely for lack of memory"
    assert death(3) == "exit code 3"


class Shifty(nn.Module):
    """A network that fails in its own way as soon as images lie in memory as channels_last."""

    def __init__(self, deed: str) -> None:
        super().__init__()
        self.body, self.deed = Model.parse(STUDENT).build((3, 12, 12), 3, seed=1), deed

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous():
            if self.deed == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if self.deed == "other answers":
                return self.body(x) * 1.5
            if self.deed == "NaN":
                return self.body(x) * float("nan")
            if self.deed == "other gradients":
                answer = self.body(x)
                return answer.detach() + 2 * (answer - answer.detach())
        return self.body(x)


@linux
@pytest.mark.parametrize(
    ("deed", "why"),
    [
        pytest.param("crash", "SIGSEGV, a fault in native code", marks=tried_in_a_child),
        ("other answers", "loss "),
        ("NaN", "loss nan away"),
        ("other gradients", "gradients 1.0e+00 away"),
    ],
)
def test_an_engine_that_crashes_or_computes_something_else_is_refused(deed: str, why: str, tmp_path: Path) -> None:
    images = IMAGES.repeat(1, 3, 1, 1)
    found = autotune(FAST, Shifty(deed), lambda: images, steps=1, training=True, folder=tmp_path)
    assert found.layout == "contiguous"
    assert why in next(tmp_path.glob("autotune-*.json")).read_text()
    with pytest.raises(ModelError, match=r"cannot be computed with Compute.*Set recipe\.compute to another one"):
        autotune(Compute(layout="channels_last"), Shifty(deed), lambda: images, steps=1, training=True)


@linux
def test_answers_are_compared_where_nothing_is_trained(tmp_path: Path) -> None:
    images = IMAGES.repeat(1, 3, 1, 1)
    found = autotune(FAST, Shifty("other answers"), lambda: images, steps=1, training=False, folder=tmp_path)
    assert found.layout == "contiguous"
    assert "answers 5.0e-01 away" in next(tmp_path.glob("autotune-*.json")).read_text()


def test_a_known_fault_is_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Model.parse("ResNetC(depth=8, width=4)").build((1, 28, 28), 10, seed=0)
    wide = Model.parse("ResNetC(depth=8, width=8)").build((1, 28, 28), 10, seed=0)
    last, contiguous = Compute(layout="channels_last"), EXACT
    monkeypatch.setattr(trials, "cpu_capability", lambda: "AVX2")
    assert "torch corrupts memory in" in known_fault(narrow, last)
    assert not known_fault(wide, last)
    assert not known_fault(narrow, contiguous)
    assert not known_fault(narrow, Compute(layout="channels_last", precision="bf16"))
    monkeypatch.setattr(trials, "cpu_capability", lambda: "AVX512")
    assert not known_fault(narrow, last)


TRIAL = """
import torch
from undistill.training.compute import FAST
from undistill.training.autotune import autotune
from undistill.models import Model
network = Model.parse("ResNetC(depth=8, width=4)").build((1, 28, 28), 10, 0)
print(autotune(FAST, network, lambda: torch.rand(128, 1, 28, 28), steps=1, training=True))
"""


@linux
@tried_in_a_child
def test_a_trial_ends_on_a_processor_without_avx512() -> None:
    """There, torch 2.13.0 corrupts memory in the trial of channels_last."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", TRIAL], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("Compute(")


def test_only_what_this_machine_measured_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's run folder could else force the compilation of a large network."""

    def chosen() -> Compute:
        return autotune(FAST, network(), lambda: IMAGES, steps=1, training=True, folder=tmp_path)

    first = chosen()
    file = next(tmp_path.glob("autotune-*.json"))
    compiled = first.model_copy(update={"compile": True})
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    for planted in ({"compute": str(compiled)}, seal({"compute": str(compiled)}), {"compute": "Motor()", "sha256": 1}):
        write_json(file, planted)
        assert not chosen().compile
        monkeypatch.setattr(trials, "_timed", lambda _: pytest.fail("it was measured again"))
        assert not chosen().compile, "what was measured anew is found again"
        monkeypatch.undo()
        monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
