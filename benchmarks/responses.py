"""Time that each defence of answers adds to a batch of 128: `python -m benchmarks.responses`. Prints Markdown.

The network's forward pass and each response are timed in turn, in the same process; the share is the median response
over the median forward pass. Weights are random, since none of the formulas takes longer for others.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from undistill.defences.defence import Defence, ResponseDefence
from undistill.defences.surrogate import SurrogateDefence
from undistill.models import Model
from undistill.runs.environment import described, environment
from undistill.training.compute import keep_freed_memory
from undistill.victims.answer import Answer

SHAPE, BATCH = (3, 32, 32), 128
NETWORKS = ("PlainCNN(width=32)", "ResNet(depth=18)")


def responses() -> list[ResponseDefence]:
    """Every listed one with its defaults, those with a network of their own at the end."""
    listed = [spec() for spec in Defence.registry.values() if issubclass(spec, ResponseDefence)]
    return sorted(listed, key=lambda one: isinstance(one, SurrogateDefence))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def measure(network: str, classes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, of the network and of each response."""
    images = torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    victim = Model.parse(network).build(SHAPE, classes, 0).eval()
    answer = Answer.of_logits(5 * torch.randn(BATCH, classes, generator=torch.Generator().manual_seed(1)))
    built = {str(one): one.response(SHAPE, classes).eval() for one in responses()}
    found: dict[str, list[float]] = {"network": [], **{name: [] for name in built}}
    for number in range(rounds + 1):
        timed = {"network": seconds(lambda: victim(images))}
        timed |= {name: seconds(lambda one=one: one(answer, images)) for name, one in built.items()}
        for name, value in timed.items() if number else ():  # the first round warms up
            found[name].append(value)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--classes", type=int, default=10)
    asked = options.parse_args()
    keep_freed_memory()
    tables = {network: measure(network, asked.classes, asked.rounds) for network in NETWORKS}
    own = {network: 1000 * statistics.median(found["network"]) for network, found in tables.items()}
    heads = [f"share of {network}, {own[network]:.0f} ms" for network in NETWORKS]
    machine = described(environment(torch.device("cpu")))
    print(f"{asked.classes} classes, batch {BATCH}, {asked.rounds} rounds; {machine}\n")
    print(f"| response | ms | {' | '.join(heads)} |\n|---|---|{'---|' * len(heads)}")
    for name in (str(one) for one in responses()):
        ms = [1000 * statistics.median(found[name]) for found in tables.values()]
        shares = " | ".join(f"{100 * one / own[network]:.1f} %" for one, network in zip(ms, NETWORKS, strict=True))
        print(f"| `{name}` | {ms[-1]:.2f} | {shares} |")


if __name__ == "__main__":
    main()
