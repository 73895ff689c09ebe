"""Eight cells of one audit, measured in a process of its own: `python -m benchmarks.audit fast FOLDER`. Prints JSON.

`plain` trains every student with the plain loop, which asks the victim at every step; `fast` is our audit of the
same cells. FOLDER keeps what an audit keeps: the second call finds the measured engines and the answers there.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import plain
from benchmarks.step import BATCH, CLASSES, SHAPE, VIEWS, samples
from undistill.attacks import Attack
from undistill.auditing.cell import Job
from undistill.auditing.launchers import Launcher
from undistill.auditing.pair import QueryOptions, VictimPair
from undistill.core.progress import Progress
from undistill.models import Model, frozen
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.runs.train import train
from undistill.training.compute import EXACT, FAST, keep_freed_memory
from undistill.training.recipe import Recipe

ATTACKS = ["SoftLabels(T=1)", "SoftLabels(T=4)", "SoftLabels(T=16)", "HardLabels()"]
STUDENTS = ["PlainCNN(width=32)", "PlainCNN(width=24)"]


def victim(folder: Path, model: str, count: int) -> Run:
    """An untrained network over random images; what it answers costs as much as what a trained one does."""
    shown, tested = samples(count), samples(BATCH)
    path = folder / "data.npz"
    if not path.exists():
        folder.mkdir(parents=True)
        np.savez(path, x_train=shown.images, y_train=shown.labels, x_test=tested.images, y_test=tested.labels)
    return train(f"{path}", model, folder / "victim", settings=TrainSettings(recipe=Recipe(epochs=0)))


def jobs(pair: VictimPair, recipe: Recipe, cells: int) -> list[Job]:
    pairs = [(attack, student) for student in STUDENTS for attack in ATTACKS][:cells]
    return [Job(pair, "victim", Attack.parse(a), Model.parse(s), 0, recipe) for a, s in pairs]


def measure_plain(model: str, count: int, epochs: int, cells: int) -> dict[str, float]:
    """Hard and soft labels cost the same here."""
    asked, data = frozen(Model.parse(model).build(SHAPE, CLASSES, 1)), samples(count)
    began = time.perf_counter()
    for student in [student for student in STUDENTS for _ in ATTACKS][:cells]:
        network = Model.parse(student).build(SHAPE, CLASSES, 0)
        for _ in range(epochs):
            list(plain.train("kd", network, asked, data.images, data.labels, BATCH, 0))
    return {"seconds": time.perf_counter() - began, "queries": cells * epochs * count}


def measure_ours(
    folder: Path, way: str, model: str, count: int, epochs: int, cells: int, launcher: Launcher
) -> dict[str, float]:
    run = victim(folder, model, count)
    recipe = Recipe(epochs=epochs, batch_size=BATCH, compute=EXACT if way == "exact" else FAST, views=VIEWS)
    pair = VictimPair(run, run, (0,), options=QueryOptions(compute=recipe.compute))
    began = time.perf_counter()
    done = launcher.run(jobs(pair, recipe, cells), folder / "cells", Progress.silent())
    seconds = time.perf_counter() - began
    stored = sum(path.stat().st_size for path in (run.folder / "answers").glob("**/*.safetensors"))
    return {
        "seconds": seconds,
        "queries": sum(cell.queries for cell in done),
        "computed": pair.victims["victim"].answers.computed,
        "attackers_images": len(pair.attackers.train),
        "stored": stored,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("way", choices=["plain", "exact", "fast"])
    options.add_argument("folder", type=Path)
    options.add_argument("--victim", default="ResNet(depth=18)")
    options.add_argument("--samples", type=int, default=1024)
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--cells", type=int, default=8)
    options.add_argument("--launcher", default="Serial")
    chosen = options.parse_args()
    size = (chosen.victim, chosen.samples, chosen.epochs, chosen.cells)
    if chosen.way == "plain":
        measured = measure_plain(*size)
    else:
        keep_freed_memory()
        measured = measure_ours(chosen.folder, chosen.way, *size, Launcher.parse(chosen.launcher))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(measured | {"peak_mib": peak, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
