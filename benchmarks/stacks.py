"""Students one after another and in the same steps, on this machine's CPU: `python -m benchmarks.stacks`.

Prints Markdown: the least time of a step of all members in three rounds, which follow one another. Kinds of students
are those of the demo, of audits of digits, and of CIFAR-10; batches of 64 as recipes have them.
"""

import argparse

import torch

from undistill.data import Samples, Split
from undistill.data.batches import Batch
from undistill.models import Model
from undistill.training.compute import keep_freed_memory
from undistill.training.fit import Fit, Suspended
from undistill.training.loop import Loop
from undistill.training.losses import cross_entropy
from undistill.training.objectives import Terms
from undistill.training.recipe import Recipe
from undistill.training.stack import Vmapped

CPU = torch.device("cpu")
KINDS = [
    ("ConvNet(width=2)", (1, 8, 8), (8, 16)),
    ("ConvNet(width=4)", (1, 8, 8), (8, 16)),
    ("ConvNet(width=8)", (1, 8, 8), (8, 16)),
    ("PlainCNN(width=4)", (3, 32, 32), (8,)),
    ("PlainCNN(width=16)", (3, 32, 32), (8,)),
]
BATCH, STEPS, ROUNDS = 64, 16, 3


def objective(network: torch.nn.Module, batch: Batch) -> Terms:
    return {"ce": cross_entropy(network(batch.images), batch.labels)}


def waiting(model: str, shape: tuple[int, int, int], seed: int) -> Loop:
    images = torch.randint(
        0, 256, (BATCH * STEPS, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    train = Samples(images, torch.arange(len(images)) % 10)
    data = Split(tuple(map(str, range(10))), train, train[torch.arange(2)])
    fit = Fit(Recipe(epochs=2 * ROUNDS, batch_size=BATCH, lr=0.01), seed, CPU, view_seed=0, suspends=True)
    try:
        fit(Model.parse(model).build(shape, 10, seed), data, objective)
    except Suspended as suspended:
        return suspended.loop
    raise AssertionError("it is suspended")


def alone_ms(loops: list[Loop]) -> float:
    return sum(1000 * loop.one_round()["seconds"] / STEPS for loop in loops)


def stacked_ms(loops: list[Loop]) -> float:
    Vmapped(loops).one_round()
    return sum(1000 * loop.history[-1]["seconds"] / STEPS for loop in loops)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    keep_freed_memory()
    print("| students | alone | stacked | faster |\n|---|---|---|---|")
    for model, shape, counts in KINDS:
        for members in counts:
            one, other = ([waiting(model, shape, seed) for seed in range(members)] for _ in range(2))
            rounds = [(alone_ms(one), stacked_ms(other)) for _ in range(ROUNDS)]
            alone, stacked = (min(times) for times in zip(*rounds, strict=True))
            print(f"| {members} x {model} | {alone:.1f} ms | {stacked:.1f} ms | {alone / stacked:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
