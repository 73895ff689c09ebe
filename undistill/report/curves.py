"""Curves: of trainings over their epochs, and of an ablation over its values; readable in black and white."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from undistill.attacks.attack import FLOORS
from undistill.auditing.curve import Points, lines
from undistill.auditing.schema import Report
from undistill.auditing.statistics import interval
from undistill.core.errors import StoreError, legible
from undistill.report.evidence import MOST, Array, read_curve
from undistill.report.figures import FLOOR, HONEST, STYLE, VICTIM, label
from undistill.report.table import read_table
from undistill.runs.run import Run

LINES = ("-", "--", ":", "-.")
MARKS = "osD^v<>P"
APART = 1.04  # factor between the places of two thieves, whose spread would hide each other
LEVELS = (":", (0, (8, 3)), (0, (8, 2, 1, 2)))
POINT = re.compile(r"((?P<what>\w+)=(?P<value>[^:]+)|(?P<share>\d+)%): (?P<line>.+)")


def of_runs(runs: Sequence[Run]) -> dict[str, Array]:
    """The curve of each run, by a name of its own; `StoreError` for one that was not trained."""
    names = [legible(run.folder.name) for run in runs]
    if len(set(names)) < len(names):
        names = [legible(str(run.folder)) for run in runs]
    curves = {}
    for name, run in zip(names, runs, strict=True):
        curve = read_curve(run)
        if curve is None:
            raise StoreError(f"{run.folder} has no epochs to draw: it took its weights as they were, or has lost them.")
        curves[name] = curve
    return curves


def training(curves: Mapping[str, Array]) -> Figure:
    """Validation accuracy by epoch of each training; below it the divergence of those that undermine, if any do."""
    undermining = [name for name, curve in curves.items() if curve.shape[1] == 2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 5.2 if undermining else 3.2), layout="constrained")
        above, *below = figure.subplots(2 if undermining else 1, 1, sharex=True, squeeze=False)[:, 0]
        for line, (name, curve) in zip(LINES * len(curves), curves.items(), strict=False):
            epochs = range(1, len(curve) + 1)
            (drawn,) = above.plot(epochs, curve[:, 0], line, label=name)
            if name in undermining:
                below[0].plot(epochs, curve[:, 1], line, color=drawn.get_color())
        above.set_ylabel("validation accuracy, %")
        for under in below:
            under.set_ylabel("T² KL at the T of training, nats")
        figure.axes[-1].set_xlabel("epoch")
        above.legend(frameon=False, fontsize=8)
    return figure


def queries(report: Report) -> Figure:
    """Accuracy and fidelity of each thief against the queries that he bought, with both models' accuracies."""
    if not report.curve:
        raise StoreError("This audit has no curve; make one: undistill audit RUN --curve.")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 6.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        bought = sorted({budget for line in lines(report.curve) for budget in line.cells})
        for number, (line, mark, dashes) in enumerate(
            zip(lines(report.curve), cycle(MARKS), cycle(LINES), strict=False)
        ):
            name, colour = label((line.side, line.attack, "")), _colour(line)
            beside = [budget * APART**number for budget in line.cells]
            for axes, field in ((above, "accuracy"), (below, "fidelity")):
                spread = [interval([100 * getattr(cell, field) for cell in cells]) for cells in line.cells.values()]
                means = np.array([value.mean for value in spread])
                ends = np.array([0.0 if value.high is None else value.high - value.mean for value in spread])
                low, high = np.minimum(ends, means), np.minimum(ends, 100 - means)
                axes.errorbar(
                    beside, means, (low, high), marker=mark, linestyle=dashes, label=name, color=colour, elinewidth=0.7
                )
        models = [("the protected model", report.victim, VICTIM)]
        models += [("the unprotected model", report.honest, HONEST)] if report.honest else []
        for (name, teacher, colour), level in zip(models, LEVELS, strict=False):
            above.axhline(100 * teacher.accuracy, color=colour, linestyle=level, linewidth=1, label=name)
        above.set_xscale("log")
        above.set_xticks(bought, [f"{budget:,}" for budget in bought])
        above.minorticks_off()
        above.set_ylabel("test accuracy, %", fontsize=8)
        below.set_ylabel("agreement with its teacher, %", fontsize=8)
        below.set_xlabel("queries: images of which the thief bought one answer each")
        above.legend(frameon=False, fontsize=8)
    return figure


def _colour(line: Points) -> str:
    floor = next(iter(line.cells.values()))[0].role in FLOORS
    return FLOOR if floor else HONEST if line.side == "honest" else VICTIM


def ablation(table: Path) -> Figure:
    """Accuracy over the ablation's value, with 95 % bands where there are several seeds; below it the divergence that
    teachers reached, where it depends on the value.

    `table` is the JSON of `undistill reproduce`; its figure 'omega=0.04: student' is a point of the line 'student'.
    """
    lines: dict[str, dict[str, list[float]]] = defaultdict(dict)
    flat: dict[str, list[float]] = {}
    reached: dict[str, float] = {}
    what = ""
    rows = [row.model_copy(update={"name": legible(row.name)}) for row in read_table(table).rows if row.accuracies]
    for row in rows:
        if found := POINT.fullmatch(row.name):
            what = found["what"] or "share of the images, %"
            value = found["value"] or found["share"]
            lines[found["line"]][value] = row.accuracies
            reached |= {value: row.divergence} if row.divergence is not None else {}
        else:
            flat[row.name] = row.accuracies
    if not lines:
        raise StoreError(f"{table} holds no ablation; 'undistill reproduce omega' writes one.")
    places = _places([value for points in lines.values() for value in points])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        varies = len(set(reached.values())) > 1
        axes, *below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1)) if varies else [figure.subplots()]
        for number, (name, points) in enumerate(lines.items()):
            _line(axes, name, [(places[value], points[value]) for value in places if value in points], number)
        for style, (name, values) in zip(cycle(LEVELS), flat.items(), strict=False):
            axes.axhline(interval(values).mean, color="#555555", linestyle=style, linewidth=1, label=name)
        axes.set_ylabel("test accuracy, %")
        axes.legend(frameon=False, fontsize=8)
        for under in below:
            known = [value for value in places if value in reached]
            x, y = [places[value] for value in known], [reached[value] for value in known]
            under.plot(x, y, "-o", color="#555555", markersize=4)
            under.set_ylabel("T² KL, nats")
        figure.axes[-1].set_xlabel(what)
    return figure


def _places(values: Iterable[str]) -> Mapping[str, float] | Mapping[str, str]:
    """Position of each value of an ablation on the axis: its number, or its rank if values are words."""
    try:
        places = {value: float(value) for value in sorted(values, key=float)}
    except ValueError:
        return {value: value for value in values}
    return places if all(abs(place) < MOST for place in places.values()) else {value: value for value in values}


def _line(axes: Axes, name: str, points: Sequence[tuple[float | str, list[float]]], number: int) -> None:
    x, spreads = [value for value, _ in points], [interval(values) for _, values in points]
    style = LINES[number % len(LINES)] + MARKS[number % len(MARKS)]
    (line,) = axes.plot(x, [spread.mean for spread in spreads], style, label=name, markersize=5)
    low, high = np.array([(spread.low, spread.high) for spread in spreads], float).clip(0, 100).T
    if np.isfinite(low).any():
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
