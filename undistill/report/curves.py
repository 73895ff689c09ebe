"""Curves: of trainings over their epochs, and of an ablation over its values; readable in black and white."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from undistill.defences import Defence
from undistill.errors import StoreError
from undistill.report.figures import STYLE
from undistill.store import Run
from undistill.verdict import interval

LINES = ("-", "--", ":", "-.")
MARKS = "osD^v<>P"
VALUE = re.compile(r"(?P<what>[^:]*?)=?(?P<value>\d+(\.\d+)?)(?P<percent>%?)(?P<rest>.*)")


def training(runs: Sequence[Run]) -> Figure:
    """Validation accuracy of each run by epoch; below it the divergence of those that undermine."""
    histories = {run.folder.name: _history(run) for run in runs}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 5.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for line, run in zip(LINES * len(runs), runs, strict=False):
            rows = histories[run.folder.name]
            epochs = [row["epoch"] for row in rows]
            accuracies = [100 * row["validation_accuracy"] for row in rows]
            (drawn,) = above.plot(epochs, accuracies, line, label=run.folder.name)
            omega = getattr(Defence.parse(run.record["defence"]), "omega", 0) if "defence" in run.record else 0
            if omega and "undermining" in rows[0]:
                below.plot(epochs, [-row["undermining"] / omega for row in rows], line, color=drawn.get_color())
        above.set_ylabel("validation accuracy, %")
        below.set_ylabel("T² KL of training views, nats")
        below.set_xlabel("epoch")
        above.legend(frameon=False, fontsize=8)
    return figure


def _history(run: Run) -> list[dict[str, float]]:
    file = run.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not rows:
        raise StoreError(f"{run.folder} has no epochs to draw: it took its weights as they were.")
    return rows


def ablation(table: Path) -> Figure:
    """Accuracy over the ablation's value, with 95 % bands where there are several seeds.

    `table` is the JSON of `undistill reproduce`; its figure 'omega=0.04: student' is a point of the line 'student'.
    """
    lines: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
    flat: dict[str, list[float]] = {}
    what = ""
    for row in _read(table):
        found = VALUE.fullmatch(row["name"])
        if found:
            what = found["what"].strip() or "share of the images, %"
            lines[found["rest"].strip(": ") or "accuracy"].append((float(found["value"]), row["accuracies"]))
        else:
            flat[row["name"]] = row["accuracies"]
    if not lines:
        raise StoreError(f"{table} holds no ablation over a number; 'undistill reproduce omega' writes one.")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(lines.items()):
            _line(axes, name, sorted(points), number)
        for name, values in flat.items():
            axes.axhline(interval(values).mean, color="#555555", linestyle=":", linewidth=1, label=name)
        axes.set_xlabel(what)
        axes.set_ylabel("test accuracy, %")
        axes.legend(frameon=False, fontsize=8)
    return figure


def _line(axes: Axes, name: str, points: Sequence[tuple[float, list[float]]], number: int) -> None:
    x, spreads = [value for value, _ in points], [interval(values) for _, values in points]
    style = LINES[number % len(LINES)] + MARKS[number % len(MARKS)]
    (line,) = axes.plot(x, [spread.mean for spread in spreads], style, label=name, markersize=5)
    if all(spread.low is not None for spread in spreads):
        low, high = ([min(max(getattr(spread, end), 0), 100) for spread in spreads] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _read(table: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(table.read_text())["rows"]
        return [row for row in rows if row["accuracies"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{table} is no table of 'undistill reproduce' ({type(error).__name__}).") from None
