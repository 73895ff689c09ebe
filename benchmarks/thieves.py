"""Every thief who asks for answers to the owner's images, tuned; then the best ones and the plain ones with new seeds.

`python -m benchmarks.thieves RUN OUT --student "PlainCNN(width=16)" --epochs 40` prints two tables, and writes them to
OUT/thieves.md. What OUT holds already is not done again.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from undistill.attacks import Attack
from undistill.attacks.attack import FLOORS, ThiefData
from undistill.auditing.cell import Job
from undistill.auditing.launchers import Launcher
from undistill.auditing.pair import QueryOptions, VictimPair
from undistill.auditing.plan import sides_of
from undistill.auditing.schema import Cell, Trial
from undistill.auditing.suites import Tuning
from undistill.auditing.tuning import tune
from undistill.auditing.verdict import preferred_trials
from undistill.core.progress import Progress
from undistill.models import Model
from undistill.runs.settings import recorded_settings
from undistill.training.compute import pick_device
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Access

PLAIN = ["SoftLabels(T=1)", "SoftLabels(T=4)", "SoftLabels(T=20)"]
LABELS = ["Scratch()", "LabelSmoothing()", "HardLabels()"]
SLOW = ("PBayes", "Reweighting", "Chain", "FixMatch", "MKD", "Averager")
"""Started first, so that no worker is left alone with one of them at the end."""


def candidates() -> list[str]:
    """Every attack that asks for answers to the owner's images."""
    kinds = [cls() for cls in Attack.registry.values()]
    own = (ThiefData.LABELLED, ThiefData.UNLABELLED)
    names = [str(attack) for attack in kinds if attack.needs == Access.QUERY and attack.data in own]
    return sorted(names, key=lambda name: not name.startswith(SLOW))


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The trial that each thief prefers, in the order of validation accuracy."""
    return sorted(preferred_trials(trials).values(), key=lambda trial: trial.validation, reverse=True)


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    columns = head.split("|")
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def spread(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def trial_rows(trials: Sequence[Trial]) -> list[list[str]]:
    rows = []
    for best in ranked(trials):
        own = [trial for trial in trials if trial.column == best.column]
        minutes = sum(trial.seconds for trial in own) / 60
        validation = f"{100 * best.validation:.1f}", f"{100 * own[0].validation:.1f}"
        recipe = Recipe.parse(best.recipe)
        rows.append(
            [
                best.attack,
                f"{recipe.lr:g}, {recipe.clip:g}",
                *validation,
                str(len(own)),
                f"{best.queries:,}",
                f"{minutes:.1f}",
            ]
        )
    return rows


def cell_rows(cells: Sequence[Cell]) -> list[list[str]]:
    rows = []
    for attack, listed in dict.fromkeys((cell.attack, cell.listed) for cell in cells):
        own = [cell for cell in cells if (cell.attack, cell.listed) == (attack, listed)]
        of = {side: [cell for cell in own if cell.side == side] for side in ("victim", "honest", "none")}
        shown = of["victim"] or of["none"]
        honest = spread([cell.accuracy for cell in of["honest"]]) if of["honest"] else "–"
        agrees = spread([cell.fidelity for cell in shown])
        minutes = fmean(cell.seconds for cell in shown) / 60
        counts = str(len(shown)), f"{shown[0].queries:,}", f"{minutes:.1f}"
        rows.append(
            [f"{attack}{', tuned' * bool(listed)}", spread([cell.accuracy for cell in shown]), honest, agrees, *counts]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--student", default="PlainCNN(width=16)")
    parser.add_argument("--attack", action="append", help="instead of all; repeatable")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--layout", default="channels_last")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--best", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="measure every tuned attack with seed 0, too")
    parser.add_argument("--launcher", default="Serial")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    pair = VictimPair.of(asked.run, None, range(1, 1 + asked.seeds), None)
    recipe = recorded_settings(pair.honest).recipe
    compute = recipe.compute.model_copy(update={"precision": asked.precision, "layout": asked.layout, "compile": False})
    recipe = recipe.model_copy(update={"epochs": asked.epochs, "compute": compute})
    pair = replace(pair, options=QueryOptions(pick_device(asked.device), compute))
    launcher, cells, tables = Launcher.from_user(asked.launcher), asked.out / "cells", list[str]()

    def job(attack: str | Attack, seed: int = 0) -> Job:
        return Job(pair, "victim", Attack.from_user(attack), Model.parse(asked.student), seed, recipe)

    def tell(title: str, head: str, rows: Sequence[Sequence[str]]) -> None:
        tables.append(f"## {title}\n\n{table(head, rows)}")
        (asked.out / "thieves.md").write_text("\n\n".join(tables) + "\n")

    def measure(title: str, jobs: Sequence[Job]) -> None:
        head = "attack|of the victim, %|of its honest twin, %|agreement, %|n|queries|minutes"
        tell(title, head, cell_rows(launcher.run(jobs, cells, progress)))

    with Progress.of(True) as progress, launcher.ready():
        listed = [job(attack) for attack in asked.attack or candidates()]
        for one in listed:
            one.check()
        trials, best = tune(listed, Tuning(trials=asked.trials, share=asked.share), launcher, cells, progress)
        head = "attack, tuned|lr, clip|validation, %|as listed, %|trials|queries|minutes of all trials"
        tell("Trials", head, trial_rows(trials))
        tuned = dict(zip((one.column for one in listed), best, strict=True))
        winners = [tuned[trial.column] for trial in ranked(trials) if tuned[trial.column].attack.role not in FLOORS]
        finals = [*map(job, LABELS), *map(job, PLAIN), *winners[: asked.best]]
        new_seeds = [
            replace(one, side=side, seed=seed) for one in finals for side in sides_of(one.attack) for seed in pair.seeds
        ]
        measure("With new seeds", new_seeds)
        if asked.all:
            measure("Every attack, seed 0", best)
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
