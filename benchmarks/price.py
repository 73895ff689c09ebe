"""Prices that were stated and paid: `python -m benchmarks.price digits FOLDER --seeds 10`. Prints Markdown.

For every seed an honest network is trained and protected at two prices, with the same command on every data set, and
with the fixed omega of the paper. Lost accuracy is measured on test images, which no choice has seen.
"""

import argparse
from pathlib import Path
from statistics import fmean

import torch

from undistill.auditing.schema import plus_minus
from undistill.auditing.statistics import interval
from undistill.core.progress import Progress
from undistill.papers.scales import setting
from undistill.runs.environment import described, environment
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.runs.train import train
from undistill.training import metrics
from undistill.training.compute import keep_freed_memory
from undistill.training.metrics import evaluate
from undistill.training.recipe import Recipe

DEFENCES = ("Nasty(price=0.5)", "Nasty(price=2)", "Nasty(omega=0.04, T=4)")


def honest(name: str, folder: Path, seed: int, progress: Progress) -> Run:
    """The honest network of a data set at the small scale, or on digits that of the demo."""
    if name == "digits":
        model, data, recipe = "ConvNet(width=16)", f"Digits(seed={seed})", Recipe()
    else:
        small = setting(name, "small")
        model, recipe = str(small.teachers["ResNet-18"]), small.recipe
        data = str(small.data.model_copy(update={"seed": seed}))
    settings = TrainSettings(seed=seed, recipe=recipe)
    return train(data, model, folder / f"honest-{seed}", settings=settings, progress=progress)


def row(defence: str, runs: list[tuple[Run, Run]]) -> str:
    """One line of the table, over seeds."""
    lost, known = [], []
    for plain, victim in runs:
        data = victim.data()
        after, before = (evaluate(run.network(), data.test).cpu() for run in (victim, plain))
        lost.append(100 * metrics.accuracy_lost(after, before, data.test.labels)[0])
        known.append(100 * victim.record["metrics"]["accuracy_lost"])
    found = [run.record["found"].get("omega") for _, run in runs]
    omegas = ", ".join(f"{omega:.3g}" for omega in found if omega is not None) or "0.04"
    divergence = fmean(run.record["metrics"]["divergence"] for _, run in runs)
    seconds = fmean(run.record["seconds"] / plain.record["seconds"] for plain, run in runs)
    values = [
        f"`{defence}`",
        plus_minus(interval(lost)),
        f"{max(lost):.1f}",
        f"{fmean(known):.1f}",
        f"{divergence:.1f}",
    ]
    return f"| {' | '.join([*values, omegas, f'{seconds:.2f}'])} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("data", help="digits, Fashion-MNIST, CIFAR-10 or CIFAR-100")
    options.add_argument("folder", type=Path)
    options.add_argument("--seeds", type=int, default=2)
    asked = options.parse_args()
    keep_freed_memory()
    victims: dict[str, list[tuple[Run, Run]]] = {defence: [] for defence in DEFENCES}
    with Progress.to_stderr() as progress:
        for seed in range(asked.seeds):
            plain = honest(asked.data, asked.folder, seed, progress)
            for number, defence in enumerate(DEFENCES):
                victim = protect(plain, defence, asked.folder / f"victim-{seed}-{number}", progress=progress)
                victims[defence].append((plain, victim))
    first = victims[DEFENCES[0]][0][0]
    print(f"{asked.data}, {first.record['model']}, n = {asked.seeds}; {described(environment(torch.device('cpu')))}\n")
    print("| defence | points lost on test images | most | on validation | T²KL | omega | of honest time |")
    print("|---|---|---|---|---|---|---|")
    for defence, runs in victims.items():
        print(row(defence, runs))


if __name__ == "__main__":
    main()
