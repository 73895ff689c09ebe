"""`make bench`: measures, and writes docs/benchmarks.md.

Every measurement is a process of its own and is repeated in every round; within a round the ways follow one
another, so that whatever else the machine does falls on all of them. Started again, it goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.audit import victim
from benchmarks.page import Figures, write_page
from undistill.runs.environment import environment

STEPS = {"PlainCNN": 12, "ResNetC(depth=20)": 8, "ResNet(depth=18)": 4}
CASES = [
    *((training, model, model) for model in STEPS for training in ("normal", "nasty", "kd")),
    ("kd", "PlainCNN", "ResNet(depth=18)"),
]
WAYS = ["plain", "exact", "fp32", "fast"]
POOL = 1264  # samples of which 1,024 are left to attackers
SMALL = ("--victim", "ResNetC(depth=20)", "--epochs", "2")


@dataclass
class Log:
    """Measurements on disk: one JSON line for each round and key."""

    file: Path

    def __post_init__(self) -> None:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: list[Figures] = [json.loads(line) for line in lines]

    def measure(self, number: int, key: str, work: Callable[[], Figures]) -> Figures:
        for row in self.rows:
            if (row["round"], row["key"]) == (number, key):
                return row
        row = {"round": number, "key": key} | work()
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.rows.append(row)
        with self.file.open("a") as file:
            print(json.dumps(row), file=file)
        return row


def child(module: str, *arguments: str) -> Figures:
    """The lines that the measurement prints."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def steps(log: Log, number: int) -> None:
    """An compute that the first round settled is kept in the others."""
    for training, model, teacher in CASES:
        for way in WAYS:
            key = f"step {training} {model} {teacher} {way}"
            settled = [str(row["compute"]) for row in log.rows if row["key"] == key and "compute" in row]
            count = STEPS[teacher if way == "plain" else model]
            how = (settled or [way])[0]
            arguments = (how, training, model, "--teacher", teacher, "--steps", str(count))
            log.measure(number, key, lambda arguments=arguments: child("benchmarks.step", *arguments))


def audits(log: Log, number: int) -> None:
    """`again`: in a folder where the trials are recorded, but nothing else."""
    with tempfile.TemporaryDirectory() as scratch:
        fast, exact = Path(scratch) / "fast", Path(scratch) / "exact"

        def again() -> Figures:
            for path in [*fast.glob("victim/answers/*/*"), *fast.glob("cells/*.json")]:
                path.unlink()
            return child("benchmarks.audit", "fast", str(fast), "--samples", str(POOL))

        def ours() -> Figures:
            return child("benchmarks.audit", "fast", str(fast), "--samples", str(POOL))

        images = log.measure(number, "audit fast", ours)["attackers_images"]
        log.measure(number, "audit again", lambda: again() if fast.exists() else ours() and again())
        log.measure(
            number, "audit exact", lambda: child("benchmarks.audit", "exact", str(exact), "--samples", str(POOL))
        )
        log.measure(
            number, "audit plain", lambda: child("benchmarks.audit", "plain", scratch, "--samples", str(images))
        )


def scaling(log: Log, number: int) -> None:
    """Exact, so that no trial is part of the time."""
    cases = {f"samples {n}": ("--samples", str(512 * n), "--cells", "4") for n in (1, 2, 4, 8)}
    cases |= {f"cells {n}": ("--samples", "1024", "--cells", str(n)) for n in (1, 2, 4, 8)}
    cases |= {
        f"pool {n}": ("--samples", "1024", "--cells", "8", "--launcher", f"Pool(workers={n}, threads=1)")
        for n in (1, 2)
    }
    for name, arguments in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            work = ("exact", f"{scratch}/audit", *SMALL, *arguments)
            log.measure(number, name, lambda work=work: child("benchmarks.audit", *work))
    for processes in (1, 2):
        log.measure(number, f"torchrun {processes}", lambda processes=processes: torchrun(processes))


def torchrun(processes: int) -> Figures:
    """Two epochs of ResNetC-20 over 1,024 images, one thread for each process."""
    with tempfile.TemporaryDirectory() as scratch:
        data = victim(Path(scratch) / "data", "PlainCNN(width=1)", 1138).folder.parent / "data.npz"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        train = [
            "-m",
            "undistill",
            "train",
            "--data",
            str(data),
            "--model",
            "ResNetC(depth=20)",
            "--out",
            f"{scratch}/run",
        ]
        recipe = ["--set", "recipe.epochs=2", "--set", "recipe.batch_size=128"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*start, *train, *recipe], env=one_thread, check=True, capture_output=True)
        record = json.loads((Path(scratch) / "run" / "run.json").read_text())
    return {"seconds": record["seconds"]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--log", type=Path, default=Path("runs/bench.jsonl"), help="what was measured so far")
    options.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    chosen = options.parse_args()
    chosen.log.parent.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.log)
    for number in range(chosen.rounds):
        for part in (steps, audits, scaling):
            part(log, number)
    write_page(log.rows, environment(torch.device("cpu")), chosen.page)
    print(chosen.page)


if __name__ == "__main__":
    main()
