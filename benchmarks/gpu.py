"""Benchmarks on a GPU, in order of importance: `python -m benchmarks.gpu --minutes 4`.

Every row is written as soon as it is measured; a row that would not end in time is left out. Images 3 x 32 x 32, ten
classes. A step is an epoch's time by its number of steps, data and recording included, in the second of two epochs.
"""

import argparse
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.audit import victim
from benchmarks.step import CLASSES, DEVICE, SHAPE, VIEWS, data_ms, flops, matrix_rate, samples, synchronised
from undistill.attacks import Attack
from undistill.auditing.cell import Job
from undistill.auditing.launchers import Launcher, Pool, Serial
from undistill.auditing.pair import QueryOptions, VictimPair
from undistill.core.progress import Progress
from undistill.data import Split
from undistill.data.batches import Batch, ViewDataset
from undistill.data.views import Views
from undistill.models import Model, frozen
from undistill.runs.environment import environment
from undistill.training.compute import Compute
from undistill.training.fit import Fit, Suspended
from undistill.training.loop import Loop
from undistill.training.losses import cross_entropy, distillation, undermining
from undistill.training.objectives import Terms
from undistill.training.recipe import Recipe
from undistill.training.stack import stack_of

FAST = Compute(precision="bf16", layout="channels_last")
IMAGES = 45_056  # of an epoch: CIFAR-10 without its validation images
FEW = 40  # steps of an epoch where each takes long
TEACHER = "ResNet(depth=18)"

Figures = dict[str, Any]


@dataclass
class Bench:
    """The measurements of one command."""

    log: Path
    ends: float
    images: int = IMAGES
    rows: list[Figures] = field(default_factory=list)

    def row(self, name: str, expected: float, measure: Callable[[], Figures]) -> None:
        """Measure and write once, unless it is expected to end too late; an error is a result as well."""
        if time.monotonic() + expected > self.ends or name in {row["row"] for row in self.rows}:
            return
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self.ends - began)
        try:
            found = measure()
        except Exception as error:
            found = {"error": ": ".join([type(error).__name__, *str(error).splitlines()[:1]])}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.rows.append({"row": name, "took": round(time.monotonic() - began, 1)} | found)
        print(json.dumps(self.rows[-1]), flush=True)
        with self.log.open("a") as file:
            print(json.dumps(self.rows[-1]), file=file)


def training(kind: str, model: str, batch: int, images: int, seed: int = 0) -> tuple[Fit, nn.Module, Split, Any]:
    """A training of two epochs, before it begins. `again` stands for answers that are remembered."""
    views = Views(flip=True, n_views=1 if kind.endswith("again") or kind == "kd" else 0)
    recipe = Recipe(epochs=2, batch_size=batch, compute=FAST, views=views, lr=0.01)
    fit = Fit(recipe, seed, DEVICE, view_seed=0)
    teacher = None
    if kind != "normal":
        teacher = Model.parse(TEACHER if kind == "kd" else model).build(SHAPE, CLASSES, 1)
    answers = fit.answers(teacher) if teacher else None

    def objective(network: nn.Module, batch: Batch) -> Terms:
        logits = network(batch.images)
        terms: dict[str, Tensor] = {"ce": cross_entropy(logits, batch.labels)}
        if answers and kind == "kd":
            terms["soft"] = 9 * distillation(answers(batch), logits, 4)
        elif answers:
            terms["undermining"] = 0.004 * undermining(logits, answers(batch), 4)
        return terms

    train = samples(images)
    data = Split(tuple(map(str, range(CLASSES))), train, train[torch.arange(batch)])
    return fit, Model.parse(model).build(SHAPE, CLASSES, seed), data, objective


def step(kind: str, model: str, batch: int, images: int, captured: bool) -> Figures:
    """One training, recorded or not."""
    fit, network, data, objective = training(kind, model, batch, images)
    with memory() as peak:
        fit(network, data, objective, capturable=captured)
    steps = -(-images // batch)
    return {"ms": 1000 * fit.history[-1]["seconds"] / steps, "how": fit.computed[0], "mib": peak(), "steps": steps}


def waiting(kind: str, model: str, batch: int, images: int, seed: int) -> Loop:
    """A training that is left to a stack."""
    fit, network, data, objective = training(kind, model, batch, images, seed)
    fit.suspends = True
    try:
        fit(network, data, objective, capturable=True)
    except Suspended as suspended:
        return suspended.loop
    raise AssertionError("it is suspended")


def stacked(kind: str, model: str, batch: int, images: int, members: int) -> Figures:
    """Several trainings in the same steps; `ms` is that of one step of all of them."""
    with memory() as peak:
        loops = [waiting(kind, model, batch, images, seed) for seed in range(members)]
        stack_of(loops).train(Progress.silent())
    steps = -(-images // batch)
    seconds = sum(loop.history[-1]["seconds"] for loop in loops)
    return {"ms": 1000 * seconds / steps, "members": members, "how": loops[0].manner, "mib": peak(), "steps": steps}


def plainly(kind: str, model: str, batch: int) -> Figures:
    """The plain loop, its images from twelve workers."""
    data = samples(batch * FEW)
    network = Model.parse(model).build(SHAPE, CLASSES, 0).to(DEVICE)
    teacher = frozen(Model.parse(TEACHER if kind == "kd" else model).build(SHAPE, CLASSES, 1).to(DEVICE))
    run = plain.train(
        kind.removesuffix(" again"), network, None if kind == "normal" else teacher, data.images, data.labels, batch, 12
    )
    return {"ms": 1000 * statistics.median(list(run)[5:])}


def rates() -> Figures:
    """Matrix products, and the operations of a step at batch 128, forward and backward."""
    counted = {}
    for model in ("PlainCNN", "ResNetC(depth=20)", TEACHER, "WRN(depth=40, width=2)"):
        network = Model.parse(model).build(SHAPE, CLASSES, 0).to(DEVICE)
        counted[model] = flops(network, torch.rand(128, *SHAPE, device=DEVICE))
    return {"bf16": matrix_rate("bf16", 8192), "fp32": matrix_rate("fp32", 8192), "flops": counted}


def data(images: int) -> Figures:
    """Views of a batch of 128, as a share of an epoch."""
    return {"ms": data_ms(ViewDataset(samples(images).to(DEVICE), VIEWS, 0, CLASSES), FAST)}


def audit(launcher: Launcher, cells: int, images: int) -> Figures:
    """Students of one architecture, with several temperatures and seeds, against a ResNet-18."""
    with tempfile.TemporaryDirectory() as scratch:
        run = victim(Path(scratch) / "audit", TEACHER, images)
        recipe = Recipe(epochs=3, batch_size=128, compute=FAST, views=VIEWS)
        pair = VictimPair(run, run, (0,), options=QueryOptions(DEVICE, recipe.compute))
        student, temperatures = Model.parse("PlainCNN"), range(1, 9)
        jobs = [
            Job(pair, "victim", Attack.parse(f"SoftLabels(T={T})"), student, seed, recipe)
            for seed in range(cells // len(temperatures))
            for T in temperatures
        ]
        began = synchronised()
        done = launcher.run(jobs, Path(scratch) / "cells", Progress.silent())
        return {"seconds": synchronised() - began, "cells": len(done), "how": done[0].compute}


@contextmanager
def memory() -> Iterator[Callable[[], int]]:
    """Peak memory of the GPU inside, in MiB."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() >> 20 if DEVICE.type == "cuda" else 0


def everything(bench: Bench) -> None:
    """All rows, the most important ones first."""
    images = bench.images
    few, pool = min(FEW * 128, images), min(12_640, images)
    resnet, cnn = TEACHER, "PlainCNN"
    bench.row("rates", 5, rates)
    bench.row("data", 5, partial(data, images))
    for kind, model in [("normal", resnet), ("kd", cnn), ("nasty again", resnet)]:
        bench.row(f"captured {kind} {model} 128", 15, partial(step, kind, model, 128, images, True))
        bench.row(f"eager {kind} {model} 128", 8, partial(step, kind, model, 128, few, False))
    bench.row(f"stacked kd {cnn} 128 x 16", 15, partial(stacked, "kd", cnn, 128, images, 16))
    bench.row(f"captured normal {resnet} 512", 15, partial(step, "normal", resnet, 512, images, True))
    bench.row(f"captured nasty {resnet} 128", 20, partial(step, "nasty", resnet, 128, images, True))
    bench.row("audit stacked", 30, partial(audit, Serial(stacked=32), 32, pool))
    bench.row("audit pool", 60, partial(audit, Pool(workers=12), 32, pool))
    bench.row(f"plain normal {resnet} 128", 15, partial(plainly, "normal", resnet, 128))
    bench.row(f"plain kd {cnn} 128", 15, partial(plainly, "kd", cnn, 128))
    for members in (8, 32):
        bench.row(f"stacked kd {cnn} 128 x {members}", 15, partial(stacked, "kd", cnn, 128, images, members))
    networks = "ResNetC(depth=20)", "WRN(depth=40, width=2)", cnn, resnet
    for model in networks:
        for kind in ("normal", "kd", "nasty again"):
            for batch in (128, 512):
                work = partial(step, kind, model, batch)
                bench.row(f"captured {kind} {model} {batch}", 12, partial(work, images, True))
        for members in (8, 16):
            named = f"stacked normal {model} 128 x {members}"
            bench.row(named, 25, partial(stacked, "normal", model, 128, few, members))
    for model in networks:
        for kind in ("normal", "kd", "nasty again"):
            for batch in (128, 512):
                bench.row(f"eager {kind} {model} {batch}", 8, partial(step, kind, model, batch, FEW * batch, False))
            bench.row(f"plain {kind} {model} 128", 15, partial(plainly, kind, model, 128))


def _time_is_up(*_: object) -> None:
    raise TimeoutError("the minutes are over")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=4.0)
    options.add_argument("--images", type=int, default=IMAGES, help="of an epoch; fewer to try this command itself")
    options.add_argument("--log", type=Path, default=Path("runs/gpu.jsonl"))
    chosen = options.parse_args()
    chosen.log.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, _time_is_up)
    bench = Bench(chosen.log, time.monotonic() + 60 * chosen.minutes, chosen.images)
    bench.row("environment", 0, lambda: dict(environment(DEVICE)))
    everything(bench)


if __name__ == "__main__":
    main()
