"""Accuracy against queries of a plain thief and the floors, at chosen budgets, each of them tuned as budget-1 says.

`python -m benchmarks.curve RUN OUT --student "PlainCNN(width=16)" --epochs 20 --budgets 300 1000 3000 10000` writes an
audit's report into OUT, where `undistill figure curve OUT` draws it. What OUT holds already is not done
again.
"""

import argparse
from pathlib import Path

from undistill.api import audit
from undistill.auditing import curve
from undistill.auditing.suites import SUITES, Suite
from undistill.runs.run import Run
from undistill.runs.settings import recorded_settings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--student", default="PlainCNN(width=16)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--budgets", type=int, nargs="+", default=[300, 1000, 3000, 10_000])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--layout", default="channels_last")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--launcher", default="Serial")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    SUITES["curve"] = Suite(
        "Plain distillation by one who buys each answer once.",
        attacks=("Scratch()", "LabelSmoothing(smoothing=0.1)", "HardLabels(once=True)", "SoftLabels(once=True, T=4)"),
        tuning=SUITES["budget-1"].tuning,
    )
    curve.budgets = lambda images: asked.budgets
    recipe = recorded_settings(Run.open(asked.run)).recipe
    compute = recipe.compute.model_copy(update={"precision": asked.precision, "layout": asked.layout, "compile": False})
    audit(
        asked.run,
        asked.out,
        suite="curve",
        students=[asked.student],
        seeds=asked.seeds,
        curve=True,
        recipe=recipe.model_copy(update={"epochs": asked.epochs, "compute": compute}),
        device=asked.device,
        launcher=asked.launcher,
        progress=True,
    )


if __name__ == "__main__":
    main()
