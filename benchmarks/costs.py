"""Quality of answers under each defence of them: `python -m benchmarks.costs RUN FOLDER`. Prints Markdown.

RUN is the run folder of an unprotected network; FOLDER gets one protected by each defence. Nothing is trained but
surrogates. Measured on test images; responses are calibrated on validation images.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from undistill.auditing.measure import flips, measure_teacher
from undistill.auditing.pair import VictimPair
from undistill.core.progress import Progress
from undistill.runs.environment import described, environment
from undistill.runs.protect import protect
from undistill.runs.run import Run

DEFENCES = (
    "Sealed(rest='uniform')",
    "Sealed(rest='prior')",
    "Sealed(rest='decoy')",
    "Sealed(levels=1)",
    "Sealed(levels=16)",
    "LabelOnly()",
    "TopK(k=3)",
    "Rounding()",
    "Temperature()",
    "Temperature(T=None)",
    "Stingy()",
    "ReverseSigmoid()",
    "ModelGuardW()",
    "ModelGuardS()",
    "LinearCMI()",
    "MAD()",
)


def rows(honest: Run, folder: Path, progress: Progress) -> Iterator[str]:
    """One line of the table for each defence, after one for the network itself."""
    for number, defence in enumerate(("", *DEFENCES)):
        victim = protect(honest, defence, folder / f"victim-{number}", progress=progress) if defence else honest
        pair = VictimPair.of(victim, honest, (0,), None)
        shown = measure_teacher(victim, pair.asked("victim"), pair.data)
        bits = getattr(pair.network("victim"), "bits", None)
        values = [
            f"`{defence}`" if defence else "none",
            f"{100 * shown.accuracy:.1f}",
            f"{100 * shown.ece:.1f}",
            f"{shown.nll:.3f}",
            f"{shown.brier:.3f}",
            f"{100 * (shown.top5 or 0):.1f}",
            f"{100 * (shown.selective or 0):.1f}",
            "–" if bits is None else f"{bits:.2f}",
            f"{100 * flips(pair):.2f}",
        ]
        yield f"| {' | '.join(values)} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", type=Path)
    options.add_argument("folder", type=Path)
    asked = options.parse_args()
    honest = Run.open(asked.run)
    print(f"{honest.record['data']}, {honest.record['model']}; {described(environment(torch.device('cpu')))}\n")
    print("| defence | accuracy | ECE, % | NLL | Brier | top-5 | accuracy at 80 % | bits | top answers changed, % |")
    print("|---|---|---|---|---|---|---|---|---|")
    with Progress.to_stderr() as progress:
        for row in rows(honest, asked.folder, progress):
            print(row, flush=True)


if __name__ == "__main__":
    main()
