"""End commands at random moments by SIGKILL, SIGTERM and SIGINT; repeat them, and compare with the undisturbed result.

    python -m benchmarks.kills --kills 120 --seed 0

About 10 seconds a kill on one core. A row for each command and signal says how often it came, how often something was
lost (the repeated command failed), came out with other bits, or ended otherwise than it should (a traceback, another
exit code, a process that stayed). Exit code 1 if anything did. Needs Linux, for /proc.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

TEACHER, STUDENT = "ConvNet(width=4)", "ConvNet(width=2)"
SET = ["--set=recipe.epochs=30", "--set=recipe.batch_size=8"]
# A checkpoint after every epoch, so that there is always something to go on from.
PROGRAM = "from undistill.training import loop; loop.CHECKPOINT_SECONDS = 0.0; from undistill.cli import app; app()"
GRACE = 5.0  # seconds in which workers, and Python's own resource tracker, notice that their parent is gone
ENDINGS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
COMMANDS = {
    "train": ["train", "--data", "toy.npz", "--model", TEACHER, "--out", "out", *SET],
    "protect": ["protect", "honest", "--defence", "Nasty", "--out", "out"],
    "audit": ["audit", "victim", "--student", STUDENT, "--seeds", "1", "--out", "out"],
    "audit in a pool": ["audit", "victim", "--student", STUDENT, "--seeds", "1", "--out", "out", "--launcher", "pool"],
}


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(words: list[str], folder: Path) -> float:
    """Run a command to its end; the seconds that it takes."""
    began = time.monotonic()
    process = start(words, folder)
    said = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}: {said[-500:]}")
    return time.monotonic() - began


def make_world(folder: Path) -> None:
    """Toy images, an honest teacher and its victim."""
    random_ = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    images = random_.integers(0, 60, (120, 12, 12)).astype(np.uint8)
    for row, label in zip(images, labels, strict=True):
        row[4 * label : 4 * label + 4] += 100
    np.savez(folder / "toy.npz", images=images, labels=labels)
    finish(["train", "--data", "toy.npz", "--model", TEACHER, "--out", "honest", *SET], folder)
    finish(["protect", "honest", "--defence", "Nasty", "--out", "victim"], folder)


def outcome(folder: Path) -> object:
    """The hash of the weights, or all cells without their times: what a repeated command must reproduce bit for bit."""
    report = folder / "out" / "report.json"
    if not report.exists():
        return json.loads((folder / "out" / "run.json").read_text())["weights_sha256"]
    cells = json.loads(report.read_text())["cells"]
    return [{name: value for name, value in cell.items() if name != "seconds"} for cell in cells]


def left(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner, *_ = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def trial(name: str, number: signal.Signals, after: float, world: Path, folder: Path) -> str:
    """One end and one repetition: '' where all is well, 'late' where the command had done all before."""
    shutil.copytree(world, folder)
    for answers in folder.glob("*/answers"):
        shutil.rmtree(answers)
    process = start(COMMANDS[name], folder)
    time.sleep(after)
    if process.poll() is not None:
        process.communicate()
        return "late"
    process.send_signal(number)
    try:
        said = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "never ended"
    deadline = time.monotonic() + GRACE
    while remaining := left(process.pid):
        if time.monotonic() > deadline:
            return f"left {len(remaining)} processes"
        time.sleep(0.05)
    if process.returncode == 0 and any((folder / "out" / last).exists() for last in ("run.json", "report.html")):
        return "late"  # all was done, and the process on its way out
    errors = [line for line in said.splitlines() if line.startswith("Error:")]
    early = process.returncode == -number  # before Python could listen
    if process.returncode != ENDINGS[number] and not early:
        return f"exit code {process.returncode}: {said[-300:]}"
    if ("Traceback" in said and not early) or "leaked" in said:
        return f"said {said[-500:]}"
    if number != signal.SIGKILL and not early and len(errors) != 1:
        return f"said {len(errors)} sentences: {said[-300:]}"
    try:
        finish(COMMANDS[name], folder)
    except RuntimeError as error:
        return f"lost: {error}"
    if [path for path in folder.rglob(".*.part") if "answers" not in path.parts]:
        return "left a half-written file"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = random.Random(options.seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as root:
        world = Path(root, "world")
        world.mkdir()
        make_world(world)
        whole, seconds = {}, {}
        for name, words in COMMANDS.items():
            folder = Path(shutil.copytree(world, Path(root, f"whole-{name}")))
            seconds[name] = finish(words, folder)
            whole[name] = outcome(folder)
        done = 0
        while done < options.kills:
            name, number = list(COMMANDS)[done % len(COMMANDS)], list(ENDINGS)[done // len(COMMANDS) % len(ENDINGS)]
            folder = Path(root, "trial")
            why = trial(name, number, chosen.uniform(0.05, seconds[name]), world, folder)
            if not why and outcome(folder) != whole[name]:
                why = "other bits"
            shutil.rmtree(folder)
            if why == "late":
                continue
            done += 1
            counts[name, number.name, "well" if not why else "not well"] += 1
            if why:
                print(f"{name}, {number.name}: {why}", flush=True)
    for (name, number_name, how), count in sorted(counts.items()):
        print(f"{name:16} {number_name:8} {count:3} {how}")
    return int(any(how != "well" for _, _, how in counts))


if __name__ == "__main__":
    sys.exit(main())
