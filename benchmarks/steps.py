"""What one training step costs, and the share of it that is data: `make bench`.

Median milliseconds of a step of batch 128 on 32 x 32 colour images: normal training, nasty training (one more
forward pass, of the adversary) and KD of the student from the teacher. Ratios within one run are meaningful;
absolute figures belong to the machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from undistill.data import Samples
from undistill.fit import Recipe, build_optimiser
from undistill.losses import cross_entropy, distillation, undermining
from undistill.models import Model, frozen
from undistill.views import to_float

BATCH = 128


def median_ms(step: Callable[[], object], repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def trainer(network: nn.Module, images: Tensor, objective: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
    optimiser, index = build_optimiser(network, Recipe()), torch.arange(BATCH)

    def step() -> None:
        views = to_float(Recipe().views(Samples(images, index), 0, 0, index, 10)[0])
        optimiser.zero_grad()
        objective(network(views), views).backward()
        optimiser.step()

    return step


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--teacher", default="ResNetC(depth=20)")
    options.add_argument("--student", default="PlainCNN(width=32)")
    options.add_argument("--repeats", type=int, default=7)
    chosen = options.parse_args()
    images, labels = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (BATCH,))
    teacher, adversary, student = (
        Model.parse(text).build((3, 32, 32), 10, seed)
        for seed, text in enumerate((chosen.teacher, chosen.teacher, chosen.student))
    )
    frozen(adversary)

    def answers(views: Tensor) -> Tensor:
        with torch.no_grad():
            return adversary(views)

    samples = Samples(images, torch.arange(BATCH))
    data = median_ms(lambda: to_float(Recipe().views(samples, 0, 0, samples.labels, 10)[0]), chosen.repeats)
    rows = {
        f"normal, {chosen.teacher}": trainer(teacher, images, lambda z, _: cross_entropy(z, labels)),
        f"nasty, {chosen.teacher}": trainer(
            teacher, images, lambda z, x: cross_entropy(z, labels) + 0.04 * undermining(z, answers(x), 4)
        ),
        f"KD of {chosen.student}": trainer(student, images, lambda z, x: distillation(answers(x), z, 4)),
    }
    print(f"| step, batch {BATCH}, {torch.get_num_threads()} threads | ms | of normal | data |\n|---|---|---|---|")
    first = None
    for name, step in rows.items():
        took = median_ms(step, chosen.repeats)
        first = first or took
        print(f"| {name} | {took:.0f} | {took / first:.2f} | {data / took:.1%} |")


if __name__ == "__main__":
    main()
