"""The arithmetic of every experiment at `paper`, and its minutes at a given rate: `python -m benchmarks.paper`.

Nothing is trained. A training step counts three times a forward pass, a frozen network's answer once; what several
figures share counts once. Prints Markdown.
"""

import argparse
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from undistill.attacks.data_free.dafl import DAFL
from undistill.attacks.data_free.fast import Fast
from undistill.attacks.data_free.synthesis import Generator
from undistill.models import Model
from undistill.papers.case import Case
from undistill.papers.reproduce import EXPERIMENTS

DATA = {
    "CIFAR10": ((3, 32, 32), 10, 50_000),
    "CIFAR100": ((3, 32, 32), 100, 50_000),
    "TinyImageNet": ((3, 64, 64), 200, 100_000),
}
KEPT = 0.9  # of the images, for training; students leave out as much again


@cache
def forward(model: Model, data: str) -> float:
    """Floating point operations for one image."""
    shape, num_classes, _ = DATA[data]
    return _count(model.build(shape, num_classes, 0), torch.zeros(1, *shape))


@cache
def generator(data: str, latent: int, width: int) -> float:
    return _count(Generator(DATA[data][0], latent, width), torch.zeros(1, latent))


def _count(network: nn.Module, example: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(example)
    return float(counter.get_total_flops())


def parts(case: Case) -> Iterator[tuple[Any, float]]:
    """The trainings behind a case, each with a name and its operations."""
    data = type(case.teacher.data).__name__
    images, teacher = KEPT * DATA[data][2], forward(case.teacher.model, data)
    for honest in filter(None, (case.teacher, case.adversary)):
        yield honest, 3 * forward(honest.model, data) * images * honest.recipe.epochs
    if case.defence:
        other = forward((case.adversary or case.teacher).model, data)
        named = (case.teacher, case.defence, case.adversary)
        yield named, (3 * teacher + other) * images * case.teacher.recipe.epochs
    if case.attack and case.student:
        shown = KEPT * images * case.share * case.recipe.epochs
        attack, student = case.attack, forward(case.student, data)
        if isinstance(attack, DAFL | Fast):
            yield case.name, shown * _data_free(attack, teacher, student, generator(data, attack.latent, attack.width))
        else:
            yield case.name, 3 * student * shown
            if attack.needs:
                asked = (case.teacher, case.defence, case.adversary, case.recipe.views, case.recipe.epochs, case.share)
                yield asked, teacher * shown


def _data_free(attack: DAFL | Fast, teacher: float, student: float, made: float) -> float:
    """For one image of a student's step."""
    if isinstance(attack, DAFL):
        return 3 * made + 2 * teacher + 3 * student
    fitted = 3 * made + 2 * teacher + 2 * student
    return fitted * attack.inner / attack.every + teacher + 3 * student


def operations(cases: list[Case]) -> float:
    return sum({name: count for case in cases for name, count in parts(case)}.values())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scale", choices=["paper", "gpu"], default="paper")
    options.add_argument("--gpu", type=float, default=1e14, help="operations a second of a GPU, assumed")
    options.add_argument("--cores", type=float, default=3.9e11, help="of two cores; docs/benchmarks.md, ResNet-18")
    rates = options.parse_args()
    print("| experiment | 10^18 operations | minutes on one GPU | hours on two cores |\n|---|---|---|---|")
    for name, experiment in EXPERIMENTS.items():
        if name == "fashion":
            continue
        count = operations(experiment(rates.scale))
        print(f"| `{name}` | {count / 1e18:.2f} | {count / rates.gpu / 60:,.0f} | {count / rates.cores / 3600:,.0f} |")


if __name__ == "__main__":
    main()
