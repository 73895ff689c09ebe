"""Honest teacher, nasty twin and the quick audit on a data set of your own, everything anew for every seed.

    python benchmarks/real_data.py fashion.npz --model "PlainCNN(width=32)" --student "PlainCNN(width=2)" \
        --omega 0.01 --seeds 0 1 --set recipe.views.flip=true

`fashion.npz` is written by `--from-idx FOLDER --count 10000 fashion.npz`, from the official Fashion-MNIST files.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

from undistill import Run, Settings, Source, TrainSettings, protect, train
from undistill.api.audits import perform
from undistill.auditing.launchers import Serial
from undistill.auditing.pair import QueryOptions, VictimPair
from undistill.auditing.plan import Plan
from undistill.cli.audits import show
from undistill.cli.config import read_settings
from undistill.core.progress import Progress
from undistill.runs.folder import claim


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("npz", type=Path)
    options.add_argument("--from-idx", type=Path, help="write the npz from the IDX files in this folder, and stop")
    options.add_argument("--count", type=int, default=60000, help="training images taken from the IDX files")
    options.add_argument("--model", default="PlainCNN(width=32)")
    options.add_argument("--student", default="PlainCNN(width=2)")
    options.add_argument("--omega", type=float, default=0.01)
    options.add_argument("--temperature", type=float, default=4)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--set", action="append", default=[], help="settings of all trainings, as in the command line")
    options.add_argument("--out", type=Path, default=Path("runs/real-data"))
    options.add_argument("--teachers-only", action="store_true", help="print validation figures, to choose omega by")
    chosen = options.parse_args()
    if chosen.from_idx:
        np.savez_compressed(chosen.npz, **read_idx(chosen.from_idx, chosen.count))
        return
    settings = read_settings(None, chosen.set, fast=False)
    recipe = TrainSettings(**settings).recipe
    with Progress.to_stderr() as progress, claim(chosen.out, {"command": "real_data", "npz": chosen.npz.name}):
        pairs = [pair(seed, chosen, settings, progress) for seed in chosen.seeds]
        if chosen.teachers_only:
            return
        pairs = [
            VictimPair(victim, honest, (seed,), options=QueryOptions(compute=recipe.compute))
            for (honest, victim), seed in zip(pairs, chosen.seeds, strict=True)
        ]
        plan = Plan.of(pairs, "quick-2", (), [chosen.student], recipe)
        report = perform(plan, chosen.out, Serial(), progress)
    show(report, chosen.out)


def pair(seed: int, chosen: argparse.Namespace, settings: dict[str, object], progress: Progress) -> tuple[Run, Run]:
    data = Source.parse(f"Npz(path={str(chosen.npz.resolve())!r}, seed={seed})")
    folder, seeded = chosen.out / f"seed-{seed}", settings | {"seed": seed}
    honest = train(data, chosen.model, folder / "honest", settings=TrainSettings(**seeded), progress=progress)
    defence = f"Nasty(omega={chosen.omega}, T={chosen.temperature})"
    out = folder / f"nasty-{chosen.omega:g}-{chosen.temperature:g}"
    victim = protect(honest, defence, out, settings=Settings(**seeded), progress=progress)
    last = [run.record["metrics"] for run in (honest, victim)]
    print(f"seed {seed} {defence}: validation accuracy {last[0]['validation_accuracy']:.4f} -> "
          f"{last[1]['validation_accuracy']:.4f}, T^2 KL {last[1]['divergence']:.2f}", flush=True)  # fmt: skip
    return honest, victim


def read_idx(folder: Path, count: int) -> dict[str, np.ndarray]:
    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header)

    return {
        "x_train": read("train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:count],
        "y_train": read("train-labels-idx1-ubyte.gz", 8)[:count],
        "x_test": read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28),
        "y_test": read("t10k-labels-idx1-ubyte.gz", 8),
    }


if __name__ == "__main__":
    main()
