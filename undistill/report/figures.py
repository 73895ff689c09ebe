"""The report's pictures as inline SVG, readable in black and white."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("svg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from undistill.attacks.attack import Role
from undistill.auditing.schema import Report
from undistill.auditing.statistics import interval
from undistill.auditing.verdict import Column, columns
from undistill.core.errors import legible
from undistill.core.files import write_atomically, write_text
from undistill.report.evidence import Array, Evidence
from undistill.training.metrics import DIVERGENCE_T as T

HONEST, VICTIM, FLOOR = "#4477aa", "#cc3311", "#555555"
OTHERS = ("backend", "interactive", "toolbar", "timezone", "webagg", "tk.", "docstring", "date.epoch")
STYLE: Any = {  # a matplotlibrc in the current folder may be a stranger's, and can have text set by LaTeX
    **{name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith(OTHERS)},
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "undistill",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(figure: Figure) -> str:
    """The figure as an <svg> element, the same bytes for the same picture."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path`.svg and `path`.png; an ending of these two is not doubled."""
    path = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    picture = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(picture, format="png", bbox_inches="tight", dpi=150)
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    write_text(files[0], svg(figure))
    write_atomically(files[1], lambda file: file.write(picture.getvalue()))
    return files


def students(report: Report, *, narrow: bool = False) -> Figure:
    """Accuracy of every student with its spread over seeds, beside both floors; a panel for each architecture.

    `narrow` draws it for the width of a phone.
    """
    found = columns(report.cells)
    with matplotlib.rc_context(STYLE):
        names = {column: fill(label(column), 18 if narrow else 42) for column in found}
        lines = max(name.count("\n") + 1 for name in names.values())
        panels = list(dict.fromkeys(student for _, _, student in found))
        height = (0.28 + 0.14 * lines) * len(found) + 1.1 * len(panels)
        figure = Figure(figsize=(4 if narrow else 8.5, height), layout="constrained")
        for axes, student in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
            rows = {column: found[column] for column in reversed(found) if column[2] == student}
            _panel(axes, rows, {c.column: c.role for c in report.cells})
            axes.set_yticks(range(len(rows)), [names[column] for column in rows], fontsize=10 if lines == 1 else 8)
            floors = "\n" if narrow else "   "
            axes.set_xlabel(
                f"test accuracy of the student {legible(student)}, %{floors}(· · · no teacher, - - - top answers only)",
                fontsize=8 if narrow else 10,
            )
    return figure


def _panel(axes: Axes, rows: Mapping[Column, Mapping[int, float]], roles: Mapping[Column, Role]) -> None:
    for height, (column, accuracies) in enumerate(rows.items()):
        _row(axes, height, column, [100 * value for value in accuracies.values()])
    for side, role, dashes in (("victim", Role.TOP_ANSWERS, "--"), ("none", Role.NO_TEACHER, ":")):
        for column, accuracies in rows.items():
            if (column[0], roles[column]) == (side, role):
                mean = 100 * statistics.fmean(accuracies.values())
                axes.axvline(mean, color=FLOOR, linestyle=dashes, linewidth=1)


def _row(axes: Axes, height: int, column: Column, values: Sequence[float]) -> None:
    spread = interval(values)
    colour, marker = {"victim": (VICTIM, "s"), "honest": (HONEST, "o"), "none": (FLOOR, "D")}[column[0]]
    axes.plot(values, [height] * len(values), "|", color=colour, markersize=9, alpha=0.5)
    axes.plot([spread.mean], [height], marker, color=colour, markersize=7)
    if spread.low is not None and spread.high is not None:
        ends = [max(spread.low, 0), min(spread.high, 100)]
        axes.plot(ends, [height, height], color=colour, linewidth=1.5)
    axes.annotate(
        f"{spread.mean:.1f}", (spread.mean, height), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
    )


def label(column: Column) -> str:
    """'SoftLabels(T=4, alpha=0.9) from the victim'."""
    side, attack, _ = column
    return (
        legible(attack).removesuffix("()")
        + {"victim": " from the protected", "honest": " from the unprotected", "none": ""}[side]
    )


def answers(evidence: Evidence) -> Figure:
    """Tempered answers of the models to the same images: the paper's bar charts."""
    count, classes = len(evidence.images), len(evidence.classes)
    models = [("protected", evidence.victim, VICTIM, "///")]
    if evidence.honest is not None:
        models.insert(0, ("unprotected", evidence.honest, HONEST, ""))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.75 * count + 0.5, 1.4 + 1.6 * len(models)), layout="constrained")
        grid = figure.subplots(1 + len(models), count, squeeze=False, height_ratios=(1.1, *[1] * len(models)))
        for number in range(count):
            picture, *bars = grid[:, number]
            pixels = evidence.images[number].transpose(1, 2, 0)
            picture.imshow(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
            picture.set_title(evidence.classes[int(evidence.labels[number])], fontsize=10)
            picture.axis("off")
            for axes, (_, values, colour, hatch) in zip(bars, models, strict=True):
                axes.bar(range(classes), values[number], color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
                axes.set_ylim(0, 1)
                axes.set_xticks(range(0, classes, max(1, math.ceil(classes / 10))))
                axes.tick_params(labelsize=7)
                if number:
                    axes.set_yticklabels([])
        for axes, (name, *_) in zip(grid[1:, 0], models, strict=True):
            axes.set_ylabel(name)
        figure.supxlabel(f"class; bars are answers softened at T = {T:g}", fontsize=9)
    return figure


def maps(evidence: Evidence) -> Figure:
    """t-SNE of features and answers of the models, one mark for each class."""
    names = [
        name
        for name in ("honest features", "victim features", "honest answers", "victim answers")
        if name in evidence.maps
    ]
    markers, shown = "osD^v<>PX*", np.unique(evidence.point_labels)
    colours = matplotlib.colormaps["tab10" if len(evidence.classes) <= 10 else "tab20"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.2 * math.ceil(len(names) / 2)), layout="constrained")
        for axes, name in zip(figure.subplots(math.ceil(len(names) / 2), 2).flat, names, strict=False):
            marks = [
                axes.scatter(
                    *evidence.maps[name][evidence.point_labels == label].T,
                    s=14,
                    marker=markers[label % 10],
                    color=colours((label + label // 10) % 20),
                    linewidths=0,
                )
                for label in shown
            ]
            axes.set_title(name.replace("honest", "unprotected:").replace("victim", "protected:"), fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        if len(evidence.classes) <= 20:
            classes = [evidence.classes[label] for label in shown]
            figure.legend(marks, classes, loc="outside lower center", ncols=10, fontsize=8, frameon=False)
    return figure


def sheets(pictures: Mapping[str, Array]) -> Figure:
    """The images that attacks made from the networks alone: pixels of a sheet for each, by name."""
    count = len(pictures)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.4 * math.ceil(count / 2)), layout="constrained")
        grid = list(figure.subplots(math.ceil(count / 2), 2, squeeze=False).flat)
        for axes in grid:
            axes.axis("off")
        for axes, (name, pixels) in zip(grid, pictures.items(), strict=False):
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(fill(legible(name), 46), fontsize=8)
    return figure
