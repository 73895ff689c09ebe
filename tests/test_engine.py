"""Precision, layout and compilation: chosen by measurement, recorded, and harmless to what is computed."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import RECIPE, STUDENT
from undistill.core.errors import ModelError, SpecError
from undistill.data import Data
from undistill.data.batches import Batch
from undistill.data.views import to_float
from undistill.models import Model
from undistill.training import autotune as trials
from undistill.training import loop as loops
from undistill.training.answers import RememberedAnswers
from undistill.training.autotune import autotune
from undistill.training.compute import EXACT, FAST, Compute
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, undermining
from undistill.training.metrics import accuracy, evaluate

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
EAGER = [Compute(precision=p, layout=la) for p in ("fp32", "bf16") for la in ("contiguous", "channels_last")]


def network() -> nn.Module:
    return Model.parse(STUDENT).build((1, 12, 12), 3, seed=1)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[Compute, float]:
    """Pretended seconds of a step by compute settings, 1 by default. Compiling is pretended."""
    pretended: dict[Compute, float] = {}
    monkeypatch.setattr(trials, "_timed", lambda step: pretended.get(step.compute, 1.0))
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    return pretended


def chosen(asked: Compute, folder: Path | None = None, steps: int = 10) -> Compute:
    return autotune(asked, network(), lambda: IMAGES, steps=steps, training=True, folder=folder)


def test_what_is_set_by_hand_is_not_tried(seconds: dict[Compute, float]) -> None:
    seconds |= dict.fromkeys(EAGER, 9.0)
    for compute in EAGER:
        assert chosen(compute) == compute
    compiled = Compute(compile=True)
    assert chosen(compiled) == compiled


@pytest.mark.parametrize("fastest", EAGER, ids=str)
def test_the_fastest_is_taken_and_recorded(fastest: Compute, seconds: dict[Compute, float], tmp_path: Path) -> None:
    seconds[fastest] = 0.4
    assert chosen(FAST, tmp_path) == fastest
    record = json.loads(next(tmp_path.glob("autotune-*.json")).read_text())
    assert record["compute"] == str(fastest)
    assert record["seconds"][str(fastest)] == 0.4


def test_a_part_can_be_left_to_the_trial(seconds: dict[Compute, float]) -> None:
    seconds[Compute(precision="bf16")] = 0.1
    seconds[Compute(layout="channels_last")] = 0.5
    assert chosen(Compute(layout="auto")) == Compute(layout="channels_last")


def test_a_recorded_trial_is_found_again(seconds: dict[Compute, float], tmp_path: Path) -> None:
    """A resumed run is computed as it was begun, whatever the machine does in the meantime."""
    seconds[EAGER[0]] = 0.4
    first = chosen(FAST, tmp_path)
    seconds[EAGER[3]] = 0.1
    assert chosen(FAST, tmp_path) == first
    next(tmp_path.glob("autotune-*.json")).write_text('{"compute":')
    assert chosen(FAST, tmp_path) == EAGER[3], "a damaged one is measured anew"


def test_compiling_must_be_worth_it(seconds: dict[Compute, float]) -> None:
    best, compiled = Compute(precision="bf16"), Compute(precision="bf16", compile=True)
    seconds |= {best: 0.5, compiled: 0.3}
    long = int(trials.COMPILING_PAYS / 0.5) + 1
    assert chosen(FAST, steps=long) == compiled
    assert chosen(FAST, steps=long - 2) == best, "not even tried for a short training"
    seconds[compiled] = 0.49
    assert chosen(FAST, steps=long) == best, "a gain within the noise is none"


def test_what_the_network_refuses_is_passed_over(tmp_path: Path) -> None:
    class Views(nn.Module):
        """`view` needs contiguous images."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 144, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x.view(len(x), -1))

    found = autotune(FAST, Views(), lambda: IMAGES, steps=1, training=True, folder=tmp_path)
    assert found.layout == "contiguous"
    assert "view" in next(tmp_path.glob("autotune-*.json")).read_text()
    with pytest.raises(ModelError, match=r"layout='channels_last'.*Set recipe\.compute to another"):
        autotune(Compute(precision="auto", layout="channels_last"), Views(), lambda: IMAGES, steps=1, training=True)


def test_a_trial_leaves_no_trace() -> None:
    torch.manual_seed(3)
    state, tried = torch.get_rng_state(), network()
    before = {name: value.clone() for name, value in tried.state_dict().items()}
    autotune(FAST, tried, lambda: IMAGES, steps=1, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in tried.state_dict().items())
    assert all(parameter.grad is None for parameter in tried.parameters())


@pytest.mark.parametrize("compute", [*EAGER, FAST], ids=str)
def test_every_engine_learns_and_returns_plain_weights(compute: Compute, toy: Data) -> None:
    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), batch.labels)}

    fit = Fit(RECIPE.model_copy(update={"compute": compute}), 0, CPU)
    trained = fit(network(), toy, objective)
    assert accuracy(evaluate(trained, toy.validation), toy.validation.labels) > 0.6
    for value in trained.state_dict().values():
        assert value.dtype in (torch.float32, torch.int64)
        assert value.is_contiguous()
    assert fit.computed == [str(compute)] or compute == FAST


def test_exact_turns_autocast_off() -> None:
    """Inside a user's own autocast, what is promised bit for bit is still fp32."""
    layer = nn.Linear(4, 3)
    with torch.autocast("cpu", torch.bfloat16), EXACT.active(CPU):
        assert layer(torch.rand(2, 4)).dtype == torch.float32
    with Compute(precision="bf16").active(CPU):
        assert layer(torch.rand(2, 4)).dtype == torch.bfloat16


def test_settings_of_the_process_are_restored() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    with pytest.raises(KeyError), Compute(precision="bf16").active(CPU):
        raise KeyError
    after = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    assert before == after


@pytest.mark.parametrize("compute", [EXACT, Compute(precision="bf16")], ids=str)
def test_the_backward_pass_is_computed_like_the_forward_pass(compute: Compute, toy: Data) -> None:
    """On a GPU, else, gradients would be TF32 and not deterministic where equal bits are promised."""
    seen: dict[str, tuple[object, ...]] = {}

    def note(when: str) -> None:
        cudnn = torch.backends.cudnn
        seen[when] = (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, torch.get_float32_matmul_precision())

    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = network(batch.images)
        note("forward")
        logits.register_hook(lambda _: note("backward"))
        return {"ce": cross_entropy(logits, batch.labels)}

    Fit(RECIPE.model_copy(update={"compute": compute, "epochs": 1}), 0, CPU)(network(), toy, objective)
    assert seen["forward"] == seen["backward"]
    assert seen["forward"][:3] == ((False, True, False) if compute == EXACT else (True, False, True))


def test_a_network_that_is_stepped_inside_an_objective_has_its_new_weights() -> None:
    """Autocast would else go on with bf16 copies of the old ones, and a generator would not learn."""
    layer, images = nn.Linear(4, 3), torch.rand(2, 4)
    with Compute(precision="bf16").active(CPU):
        before = layer(images)
        with torch.no_grad():
            layer.weight.mul_(2)
        assert not torch.equal(layer(images), before)


def test_a_refusal_without_a_message_is_passed_over() -> None:
    class Contiguous(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Model.parse(STUDENT).build((3, 12, 12), 3, seed=1)

        def forward(self, x: Tensor) -> Tensor:
            assert x.is_contiguous()
            return self.body(x)

    found = autotune(FAST, Contiguous(), lambda: IMAGES.repeat(1, 3, 1, 1), steps=1, training=True)
    assert found.layout == "contiguous"


@pytest.mark.parametrize("content", ["{}", "[]", '{"compute": "Motor()"}', '{"compute":'])
def test_a_damaged_trial_is_measured_anew(content: str, seconds: dict[Compute, float], tmp_path: Path) -> None:
    seconds[EAGER[0]] = 0.4
    chosen(FAST, tmp_path)
    next(tmp_path.glob("autotune-*.json")).write_text(content)
    assert chosen(FAST, tmp_path) == EAGER[0]


def test_of_several_processes_one_tries(tmp_path: Path) -> None:
    """They would else choose differently, and cells of one audit would be computed in different ways."""
    program = (
        "import sys, time, torch; from pathlib import Path; from undistill.training import autotune;"
        "from undistill.models import Model; from undistill.training.compute import FAST;"
        "autotune._timed = lambda step: time.sleep(0.2) or time.time() % 1;"
        "network = Model.parse('ConvNet(width=2)').build((1, 12, 12), 3, 1);"
        "print(autotune.autotune(FAST, network, lambda: torch.rand(4, 1, 12, 12), steps=1, training=True,"
        "folder=Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({process.communicate(timeout=100)[0] for process in processes}) == 1


def test_why_losses_are_taken_in_fp32() -> None:
    """From the same bf16 logits, a KL in bf16 is wrong by tens of percent where networks nearly agree; ours is not."""
    generator = torch.Generator().manual_seed(0)
    nasty = torch.randn(256, 10, generator=generator).bfloat16()
    adversary = (nasty.float() + 0.1 * torch.randn(256, 10, generator=generator)).bfloat16()

    def in_(dtype: torch.dtype) -> float:
        log_p, log_q = ((z.to(dtype) / 4).log_softmax(1) for z in (nasty, adversary))
        return float(-16 * (log_p.exp() * (log_p - log_q)).sum(1).mean())

    truth = in_(torch.float64)
    ours = undermining(nasty, adversary, 4.0)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(truth, rel=1e-4)
    assert abs(in_(torch.bfloat16) / truth - 1) > 0.1


def test_unknown_engines_are_explained() -> None:
    with pytest.raises(SpecError, match="should be 'fp32', 'bf16' or 'auto'"):
        Compute.parse("Compute(precision='fp16')")


FREED = """
import torch
from pathlib import Path
from undistill.training.compute import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

keep_freed_memory()
before = resident()
block = torch.ones(50_000_000)
grown = resident() - before
del block
print((resident() - before) / grown)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    kept = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True).stdout
    assert float(kept) > 0.9


@pytest.mark.slow
def test_compiled_steps_agree_with_eager_ones(toy: Data) -> None:
    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), batch.labels)}

    def losses(compute: Compute) -> list[float]:
        fit = Fit(RECIPE.model_copy(update={"compute": compute, "epochs": 2}), 0, CPU)
        fit(network(), toy, objective)
        return [epoch["loss"] for epoch in fit.history]

    assert losses(Compute(compile=True)) == pytest.approx(losses(EXACT), rel=1e-3)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("compute", [*EAGER, FAST, Compute(precision="bf16", compile=True)], ids=str)
def test_every_engine_learns_on_a_gpu(compute: Compute, toy: Data) -> None:
    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), batch.labels)}

    fit = Fit(RECIPE.model_copy(update={"compute": compute}), 0, torch.device("cuda"))
    trained = fit(network(), toy, objective)
    logits = evaluate(trained, toy.validation)
    assert accuracy(logits.cpu(), toy.validation.labels) > 0.6


@needs_cuda
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_no_step_waits_for_the_gpu(ema: float, toy: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an epoch nothing is read back, once its views are answered; one read at its end, for the metrics."""
    victim = RememberedAnswers(network().cuda())

    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), victim(batch).softmax(1))}

    step = loops.Loop.step

    def watched(loop: loops.Loop, views: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        victim(Batch.of(loop.dataset, loop.epoch, index, to_float(views), labels))
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(loop, views, labels, index)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loops.Loop, "step", watched)
    Fit(RECIPE.model_copy(update={"epochs": 1, "ema": ema}), 0, torch.device("cuda"))(network(), toy, objective)
