"""The price of nastiness on digits: accuracy kept against damage done, over omega, T and warm start.

    python benchmarks/tradeoff.py --omega 0.02 0.03 0.04 --temperature 4 --seeds 100 101 102

Everything is measured on the *validation* split, so that a setting may be chosen from it. Prints a
Markdown row per setting: means and standard deviations over the seeds (split, teachers, students).
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path
from tempfile import mkdtemp

import torch

from undistill import Model, Recipe, Run, Settings, TrainSettings, protect, train
from undistill.attacks.distillation.soft_labels import SoftLabels
from undistill.attacks.labels.scratch import Scratch
from undistill.auditing.students import Students
from undistill.core.seeds import derive
from undistill.data import Digits
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy, evaluate
from undistill.victims.oracle import Oracle


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--omega", type=float, nargs="+", default=[0.02, 0.03, 0.04])
    options.add_argument("--temperature", type=float, nargs="+", default=[4.0])
    options.add_argument("--warm-start", type=float, nargs="+", default=[0.0], help="0 is from scratch")
    options.add_argument("--clip", type=float, nargs="+", default=[Recipe().clip])
    options.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    options.add_argument("--model", default="ConvNet(width=16)")
    options.add_argument("--student", default="ConvNet(width=2)")
    options.add_argument("--epochs", type=int, default=Recipe().epochs)
    options.add_argument("--student-epochs", type=int, default=60)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--out", type=Path, default=None, help="where runs are kept (default: a temporary folder)")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    out = chosen.out or Path(mkdtemp())
    print("command: python " + " ".join(sys.argv), flush=True)
    print("| clip | T | omega | warm start | honest | nasty | T²KL | scratch | KD honest | KD nasty | damage |")
    print("|---" * 11 + "|", flush=True)
    for clip, T, omega, warm in itertools.product(chosen.clip, chosen.temperature, chosen.omega, chosen.warm_start):
        recipe = Recipe(epochs=chosen.epochs, clip=clip)
        rows = [one_seed(seed, recipe, T, omega, warm or None, chosen, out) for seed in chosen.seeds]
        print(
            f"| {clip:g} | {T:g} | {omega:g} | {warm:g} | "
            + " | ".join(spread(values) for values in zip(*rows, strict=True))
            + " |",
            flush=True,
        )


def one_seed(
    seed: int, recipe: Recipe, T: float, omega: float, warm: float | None, chosen: argparse.Namespace, out: Path
) -> list[float]:
    """Honest, nasty, divergence, scratch, KD from honest, KD from nasty, damage; accuracies in %."""
    base = out / f"{seed}-clip{recipe.clip:g}"
    honest = train(Digits(seed=seed), chosen.model, base / "honest", settings=TrainSettings(seed=seed, recipe=recipe))
    defence = f"Nasty(omega={omega}, T={T}, warm_start={warm})"
    nasty = protect(
        honest, defence, base / f"nasty-{T:g}-{omega:g}-{warm}", settings=Settings(seed=seed, recipe=recipe)
    )
    scratch, kd_honest = (
        student(honest, Scratch(), seed, chosen),
        student(honest, SoftLabels(T=T), seed, chosen),
    )
    kd_nasty = student(nasty, SoftLabels(T=T), seed, chosen)
    teachers = [100 * run.record["metrics"]["validation_accuracy"] for run in (honest, nasty)]
    return [*teachers, nasty.record["metrics"]["divergence"], scratch, kd_honest, kd_nasty, kd_honest - kd_nasty]


def student(run: Run, attack: Scratch | SoftLabels, seed: int, chosen: argparse.Namespace) -> float:
    data, seed = run.data(), derive(seed, "student")
    fit = Fit(Recipe(epochs=chosen.student_epochs), seed, torch.device("cpu"))
    students = Students(Model.parse(chosen.student), data.shape, data.num_classes, seed)
    network = attack.run(Oracle(run.network(), attack.needs), students, data, fit)
    return 100 * accuracy(evaluate(network, data.validation), data.validation.labels)


def spread(values: tuple[float, ...]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
