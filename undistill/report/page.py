"""report.json, and what is made from it: report.html for people, report.md for repositories, controls.json."""

import re
from collections import Counter
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pydantic import ValidationError

from undistill.attacks.attack import Buying, Role, ThiefData
from undistill.auditing.curve import price_of_a_copy
from undistill.auditing.schema import Cell, Interval, Part, Report, Threat, plus_minus
from undistill.auditing.statistics import interval
from undistill.auditing.verdict import best_thief, columns, preferred_trials
from undistill.core.errors import StoreError, legible
from undistill.core.files import parse_json, read_text, require_plain, sha256, write_json, write_text
from undistill.report import figures
from undistill.report.advice import GLOSSARY, advice, anchor, explained, word
from undistill.report.curves import queries, training
from undistill.report.decision import decide
from undistill.report.evidence import read_evidence
from undistill.report.review import controls, fields, told, written
from undistill.training.recipe import Recipe

Written = TypeVar("Written", bound=Part)

HTML = Environment(
    loader=PackageLoader("undistill.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _plain(value: object) -> object:
    """Text that a Markdown page shows as it is: on one line, and without markup, HTML or cells of a table."""
    if not isinstance(value, str):
        return value
    return re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", legible(" ".join(value.split())).replace("&", "&amp;"))


MARKDOWN = HTML.overlay(autoescape=False, finalize=_plain)


def write_report(report: Report, folder: Path) -> None:
    """Write report.json into `folder`, where `evidence.npz` lies already, then both pages."""
    write_json(folder / "report.json", report.model_dump())
    render(folder)


def read_report(folder: Path) -> Report:
    """Raises `StoreError` where there is no whole report."""
    return read_written(folder / "report.json", Report, "'undistill audit' or 'undistill demo' writes one")


def read_written(path: Path, kind: type[Written], writer: str) -> Written:
    """The JSON file of a command as `kind`; `StoreError`, naming its `writer`, where there is none that is whole."""
    if not path.is_file():
        raise StoreError(f"There is no {path}; {writer}.")
    require_plain(path.parent)
    try:
        return kind.model_validate(parse_json(read_text(path)))
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        why = str(error)
    raise StoreError(f"{path} is no {kind.__name__.lower()} of this version of undistill ({legible(why)}).")


def render(folder: Path) -> Path:
    """Make report.html, report.md and controls.json anew from report.json and evidence.npz."""
    report, evidence = read_report(folder), read_evidence(folder / "evidence.npz")
    pictures = {
        "students": draw(figures.students(report)),
        "students_narrow": draw(figures.students(report, narrow=True)),
        "answers": draw(figures.answers(evidence)),
        "maps": draw(figures.maps(evidence)),
        "curve": draw(queries(report)) if report.curve else None,
        "training": draw(training(evidence.curves)) if evidence.curves else None,
        "sheets": draw(figures.sheets(evidence.sheets)) if evidence.sheets else None,
    }
    budget = max((cell.budget for cell in report.cells if cell.budget is not None), default=None)
    digest, decision = sha256(folder / "report.json"), decide(report)
    context = {
        "report": report,
        "decision": decision,
        "controls": controls(report),
        "review": fields(report),
        "told": told,
        "twin": report.twin,
        "budget": budget,
        "advice": advice(report),
        "best": best(report),
        "glossary": GLOSSARY,
        "anchor": anchor,
        "explained": explained,
        "word": word,
        "rows": table(report),
        "costs": costs(report),
        "models": ["protected", *(["unprotected"] if report.honest else [])],
        "copy_price": price_of_a_copy(report) if report.curve else "",
        "percent": percent,
        "points": points,
    }
    write_json(folder / "controls.json", written(report, digest))
    html = HTML.get_template("report.html").render(context, pictures=pictures)
    write_text(folder / "report.md", MARKDOWN.get_template("report.md").render(context))
    write_text(folder / "report.html", html)
    return folder / "report.html"


def best(report: Report) -> dict[str, str]:
    """The best thief: its name and accuracy."""
    found = columns(report.cells)
    column = best_thief(report)
    return {"attack": figures.label(column), "accuracy": percent(interval(list(found[column].values())))}


def costs(report: Report) -> list[tuple[str, list[str]]]:
    """Rows of everything that protecting may cost: its name, and its value of the protected model and of its twin."""
    both = [report.victim, *([report.honest] if report.honest else [])]
    rows: list[tuple[str, list[str]]] = [("accuracy", [percent(one.accuracy) for one in both])]
    lost = [pair.worst_class for pair in report.pairs if pair.worst_class]
    if lost and all(len(_known(one.by_class)) and len(one.by_class) == report.classes for one in both):
        worst = max(lost, key=lambda one: one.lost.mean if one.lost.low is None else one.lost.low)
        place = report.class_names.index(worst.name) if worst.name in report.class_names else 0
        of_it = [_share(one.by_class[place]) for one in both]
        rows.append((f"accuracy of the class that lost most, {legible(worst.name)}", of_it))
        rows.append(("accuracy of its worst class", [_share(min(_known(one.by_class))) for one in both]))
    rows.append(("accuracy on the 80 % of which it is surest", [_share(one.selective) for one in both]))
    rows.append(("label among its five highest answers", [_share(one.top5) for one in both]))
    rows.append(("ECE, in points", [f"{100 * one.ece:.1f}" for one in both]))
    rows.append(("NLL, in nats", [f"{one.nll:.3f}" for one in both]))
    rows.append(("Brier score", ["–" if one.brier is None else f"{one.brier:.3f}" for one in both]))
    return rows


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def draw(figure: Figure) -> Markup:
    return Markup(figures.svg(figure))


def table(report: Report) -> list[dict[str, str]]:
    """One row for each (side, attack, student), means over seeds; attacks of one family stand together."""
    rows, tried = [], Counter(trial.column for trial in report.trials)
    worst = ("victim", report.verdict.worst_attack, report.verdict.worst_student)
    families = {cell.column: cell.role for cell in report.cells}
    for column, accuracies in sorted(columns(report.cells).items(), key=lambda row: list(Role).index(families[row[0]])):
        cells = [cell for cell in report.cells if cell.column == column]
        rows.append(
            {
                "family": families[column].value,
                "attack": figures.label(column),
                "threat": threat(cells[0].threat),
                "tuned": tuned(report, cells[0]),
                "trials": str(tried[column]) if tried else "–",
                "mark": "worst case" if column == worst else "",
                "student": column[2],
                "accuracy": percent(interval(list(accuracies.values()))),
                "fidelity": percent(interval([cell.fidelity for cell in cells])) if column[0] != "none" else "–",
                "queries": f"{max(cell.queries for cell in cells):,}",
                "n": str(len(cells)),
            }
        )
    return rows


def threat(found: Threat | None) -> str:
    """The threat in words; empty for cells of earlier versions."""
    if found is None:
        return ""
    data = {
        ThiefData.LABELLED: f"{found.images:,} labelled images",
        ThiefData.UNLABELLED: f"{found.images:,} images without labels",
        ThiefData.SURROGATE: f"a pool of {found.images:,} other images",
        ThiefData.NONE: "no images",
    }[found.data]
    buying = {
        Buying.EACH_VIEW: "asks for every view",
        Buying.ONCE: "buys each answer once",
        Buying.CHOSEN: "chooses what to ask",
    }[found.buying]
    asks = {"nothing": "asks nobody", "weights": "has the weights", "answers": buying}[found.access]
    return f"{data}, {asks}"


def tuned(report: Report, cell: Cell) -> str:
    """The setting that a thief chose, where it is not the listed one."""
    if not cell.listed:
        return ""
    best = preferred_trials(report.trials).get(cell.column)
    if best is None:  # a report that somebody edited
        return cell.attack
    recipe, usual = Recipe.parse(best.recipe), Recipe.parse(report.recipe)
    values = ((name, getattr(recipe, name), getattr(usual, name)) for name in ("lr", "clip"))
    return ", ".join([cell.attack, *(f"{name} {value:g}" for name, value, other in values if value != other)])


def percent(value: Interval | float) -> str:
    """0.9123 -> '91.2 %', with half the width of the interval where there is one.

    An interval that reaches beyond 0 or 100 % is cut there, and shown by its ends.
    """
    if isinstance(value, float):
        return f"{100 * value:.1f} %"
    if value.low is None or value.high is None or (value.low >= 0 and value.high <= 1):
        return f"{plus_minus(value, 100)} %"
    return f"{100 * value.mean:.1f} % ({100 * max(value.low, 0):.0f} to {100 * min(value.high, 1):.0f})"


def points(value: Interval) -> str:
    """A difference of shares in points, signed: '+2.3 ± 0.4'."""
    return plus_minus(value, 100, "+")
