"""One training step, measured in a process of its own: `python -m benchmarks.step fast nasty "ResNet(depth=18)"`.

The way is `plain` (see plain.py), `exact` (our loop, fp32 and default layout), `fp32` (the best layout by
trial), `fast` (precision too), or settings such as `Compute(precision='bf16')`. Prints JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain
from undistill.data import Samples, Split
from undistill.data.batches import Batch, ViewDataset
from undistill.data.views import Views, to_float
from undistill.models import Model, frozen
from undistill.training.compute import EXACT, FAST, Compute, keep_freed_memory
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation, undermining
from undistill.training.recipe import Recipe

SHAPE, CLASSES, BATCH = (3, 32, 32), 10, 128
VIEWS = Views(flip=True)
ENGINES = {"exact": EXACT, "fp32": Compute(layout="auto", compile="auto"), "fast": FAST}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def samples(count: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=generator)
    return Samples(images, torch.arange(count) % CLASSES)


def median_ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def synchronised() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_plain(training: str, network: nn.Module, teacher: nn.Module | None, steps: int) -> dict[str, object]:
    """The better of loading in this process and in two workers."""
    data, ways = samples(BATCH * (steps + 2)), {}
    for workers in (0, 2):
        run = plain.train(training, network, teacher and frozen(teacher), data.images, data.labels, BATCH, workers)
        ways[workers] = median_ms(list(run)[2:])
    best = min(ways, key=ways.__getitem__)
    return {"ms": ways[best], "workers": best}


def measure_ours(
    compute: Compute, training: str, network: nn.Module, teacher: nn.Module | None, steps: int
) -> dict[str, object]:
    """`ms` of a step whose answers are remembered, `answer_ms` to answer one batch for the first time."""
    keep_freed_memory()
    train = samples(BATCH * (steps + 2))
    fit = Fit(Recipe(epochs=1, batch_size=BATCH, compute=compute, views=VIEWS), 0, DEVICE)
    answers = fit.answers(teacher) if teacher else None
    stream = ViewDataset(train.to(DEVICE), VIEWS, 0, CLASSES)
    starts, answering = [], [0.0]

    def objective(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        starts.append(synchronised())
        z = network(batch.images)
        terms = {"ce": cross_entropy(z, batch.labels)}
        if answers and training == "nasty":
            terms["undermining"] = 0.04 * undermining(z, answers(batch), 4)
        elif answers:
            terms["soft"] = 9 * distillation(answers(batch), z, 4)
        return terms

    if answers:
        answers(batch_of(stream))  # settles the compute
        answers._held.clear()
        began = synchronised()
        answers.epoch(stream, 0)
        answering = [(synchronised() - began) * BATCH / len(train)]
    split = Split(tuple(map(str, range(CLASSES))), train, train[torch.arange(BATCH)])
    fit(network, split, objective)
    steps_ms = median_ms([after - before for before, after in pairwise(starts[1:])])
    return {
        "ms": steps_ms,
        "answer_ms": median_ms(answering),
        "data_ms": data_ms(stream, Compute.parse(fit.computed[0])),
        "compute": fit.computed[0],
    }


def batch_of(stream: ViewDataset) -> Batch:
    index = torch.arange(BATCH, device=DEVICE)
    views, labels = stream.show(0, index)
    return Batch.of(stream, 0, index, to_float(views), labels)


def data_ms(stream: ViewDataset, compute: Compute) -> float:
    """Of one batch, as a share of an epoch, whose views are made together."""
    times, parts = [], torch.arange(len(stream.samples), device=DEVICE).split(BATCH)
    for epoch in range(9):
        began = synchronised()
        for views, _ in stream.shows(epoch, parts):
            compute.laid_out(to_float(views))
        times.append((synchronised() - began) / len(parts))
    return median_ms(times)


def flops(network: nn.Module, images: Tensor) -> int:
    """Of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return int(counter.get_total_flops())


def matrix_rate(precision: str, size: int = 4096) -> float:
    """FLOP/s of a large matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        began = synchronised()
        a @ b
        times.append(synchronised() - began)
    return 2 * size**3 / statistics.median(times)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("way", help="plain, exact, fp32, fast, or Compute(...)")
    options.add_argument("training", choices=["normal", "nasty", "kd"])
    options.add_argument("model")
    options.add_argument("--teacher", help="the model itself by default")
    options.add_argument("--steps", type=int, default=6)
    chosen = options.parse_args()
    network = Model.parse(chosen.model).build(SHAPE, CLASSES, 0).to(DEVICE)
    teacher = None
    if chosen.training != "normal":
        teacher = Model.parse(chosen.teacher or chosen.model).build(SHAPE, CLASSES, 1).to(DEVICE)
    if chosen.way == "plain":
        print(json.dumps(measure_plain(chosen.training, network, teacher, chosen.steps)))
        return
    count = flops(network, torch.rand(BATCH, *SHAPE, device=DEVICE))
    network.zero_grad()
    compute = ENGINES.get(chosen.way) or Compute.parse(chosen.way)
    measured = measure_ours(compute, chosen.training, network, teacher, chosen.steps)
    rate = matrix_rate(Compute.parse(str(measured["compute"])).precision)
    print(json.dumps(measured | {"flops": count, "matrix_rate": rate}))


if __name__ == "__main__":
    main()
