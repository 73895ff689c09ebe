"""comparison.json and the two pages made from it: a table that can be sorted, and price against leak."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from undistill.auditing.comparison import NONE, Comparison, Row
from undistill.auditing.schema import Interval
from undistill.auditing.suites import Tuning
from undistill.core.errors import SpecError, legible
from undistill.core.files import write_json, write_text
from undistill.report.figures import FLOOR, HONEST, STYLE, VICTIM, svg
from undistill.report.page import HTML, MARKDOWN, percent, points, read_written


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json into `folder`, then both pages."""
    write_json(folder / "comparison.json", comparison.model_dump())
    render_comparison(folder)


def read_comparison(folder: Path) -> Comparison:
    """Raises `StoreError` where there is no whole comparison."""
    return read_written(folder / "comparison.json", Comparison, "'undistill compare' writes one")


def render_comparison(folder: Path) -> Path:
    """Make comparison.html and comparison.md anew from comparison.json."""
    comparison = read_comparison(folder)
    context = {
        "comparison": comparison,
        "rows": [cells(row) for row in comparison.rows],
        "attacks": list(dict.fromkeys(name for row in comparison.rows for name in row.accuracies)),
        "matrix": [(row.defence, row.accuracies, row.beyond) for row in comparison.rows],
        "tuning": tuning(comparison.tuning),
        "percent": percent,
        "points": points,
    }
    page = HTML.get_template("comparison.html").render(context, picture=Markup(svg(pareto(comparison.rows))))
    write_text(folder / "comparison.md", MARKDOWN.get_template("comparison.md").render(context))
    write_text(folder / "comparison.html", page)
    return folder / "comparison.html"


TICKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50)
NEAR = 12  # pixels within which two numbers would cover each other
COLUMNS = (
    "accuracy",
    "cost, points",
    "leak, points",
    "against labels",
    "best copy",
    "damage",
    "ECE, %",
    "NLL",
    "bits",
    "ms a query",
)
"""Numbers of the table, between the defence and whether it can be shipped."""


def cells(row: Row) -> dict[str, object]:
    """One row of the table: words, and for each of `COLUMNS` what is shown and by what it is sorted."""
    bits = "–" if row.bits is None else f"{row.bits:.3g}"
    slower = row.ms_per_query / row.ms_per_query_unprotected if row.ms_per_query_unprotected else 1.0
    values: list[tuple[str, float]] = [
        (percent(row.victim.accuracy), row.victim.accuracy),
        (points(row.cost), row.cost.mean),
        (points(row.leak_hard), row.leak_hard.mean),
        (points(row.leak_label_smoothing), row.leak_label_smoothing.mean),
        (percent(row.best_accuracy), row.best_accuracy),
        (points(row.damage), row.damage.mean),
        (f"{100 * row.victim.ece:.1f}", row.victim.ece),
        (f"{row.victim.nll:.3f}", row.victim.nll),
        (bits, math.inf if row.bits is None else row.bits),
        (f"{row.ms_per_query:.3f} ({slower:.2f}x)", slower),
    ]
    lacking = f" (not tried: {', '.join(row.skipped)})" if row.skipped else ""
    shippable = "no: " + "; ".join(row.not_shippable) if row.not_shippable else "yes"
    return {
        "defence": row.defence,
        "folder": row.folder,
        "shippable": shippable,
        "lacking": lacking,
        "values": [(name, shown, f"{number:.9g}") for name, (shown, number) in zip(COLUMNS, values, strict=True)],
    }


def tuning(text: str) -> str:
    """'each thief tried 3 settings for 33 % of the epochs', from the text of a `Tuning`."""
    try:
        found = Tuning.parse(text)
    except SpecError:  # a file that somebody edited
        return legible(text)
    settings = "1 setting" if found.trials == 1 else f"{found.trials} settings"
    return f"each thief tried {settings} for {found.share:.0%} of the epochs"


def pareto(rows: Sequence[Row]) -> Figure:
    """Price against what is left to the thief, and against damage; those that no other beats in both are joined."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6 + 0.17 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.set_ylabel("leak: worst thief ahead of top answers, points")
        right.set_ylabel("damage to plain distillation, points")
        planes = [
            (left, _plane(left, rows, [row.leak_hard for row in rows], sign=1)),
            (right, _plane(right, rows, [row.damage for row in rows], sign=-1)),
        ]
        named = [f"{number} {legible(row.defence)}" for number, row in enumerate(rows)]
        figure.supxlabel("\n".join(named), fontsize=8, ha="left", x=0.02)
        figure.draw_without_rendering()  # only now it is known where points lie on the page
        for axes, points in planes:
            _number(axes, points)
    return figure


def _plane(axes: Axes, rows: Sequence[Row], heights: Sequence[Interval], sign: int) -> dict[int, tuple[float, float]]:
    """Draw every row with its intervals; a low height is good for `sign` 1, a high one for -1.

    Returns the points by row, those that no other beats first. Both axes are linear up to 2 points and logarithmic
    beyond, so that one ruined network does not press all others together.
    """
    points = {place: (100 * row.cost.mean, 100 * heights[place].mean) for place, row in enumerate(rows)}
    for (x, y), row, height in zip(points.values(), rows, heights, strict=True):
        colour = HONEST if row.defence == NONE else VICTIM
        for interval, along in ((height, "y"), (row.cost, "x")):
            if interval.low is not None and interval.high is not None:
                reach = [100 * interval.low, 100 * interval.high]
                line = ([x, x], reach) if along == "y" else (reach, [y, y])
                axes.plot(*line, color=colour, linewidth=1, alpha=0.25)
        axes.plot(x, y, "D" if row.not_shippable else "o", color=colour, markersize=6)
    best = front([x for x, _ in points.values()], [sign * y for _, y in points.values()])
    axes.step(*zip(*(points[place] for place in best), strict=True), "--", where="post", color=FLOOR, linewidth=1)
    axes.axhline(0, color=FLOOR, linewidth=0.6)
    axes.set_xlabel("price: accuracy lost, points")
    for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        scale("symlog", linthresh=2)
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    return {place: points[place] for place in [*best, *(place for place in points if place not in best)]}


def _number(axes: Axes, points: Mapping[int, tuple[float, float]]) -> None:
    """Write the row's number beside its point, unless another number stands there already."""
    taken: list[tuple[float, float]] = []
    for number, point in points.items():
        x, y = axes.transData.transform(point)
        if all(abs(x - other) > NEAR or abs(y - above) > NEAR for other, above in taken):
            taken.append((x, y))
            axes.annotate(str(number), point, xytext=(4, 5), textcoords="offset points", fontsize=8)


def front(prices: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Places of the points that no other one equals or beats in both, by ascending price."""
    order = sorted(range(len(prices)), key=lambda place: (prices[place], losses[place]))
    kept: list[int] = []
    for place in order:
        if not kept or losses[place] < losses[kept[-1]]:
            kept.append(place)
    return kept
