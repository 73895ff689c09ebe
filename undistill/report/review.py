"""Fields of an audit for a security review, and controls by their ids. Also written as controls.json."""

from collections.abc import Callable
from statistics import fmean
from typing import Any, Literal, NamedTuple

from undistill.attacks.attack import FLOORS
from undistill.auditing.curve import harmless, lines, queries_within
from undistill.auditing.schema import Cell, Interval, Report
from undistill.auditing.verdict import adapts, best_thief, columns, students_of
from undistill.auditing.wording import beyond_labels, is_above_zero, points, protection
from undistill.core.errors import UndistillError
from undistill.data.source import Source
from undistill.report.decision import FEW, decide

Status = Literal["met", "partly", "not assessed"]
Fields = dict[str, dict[str, Any]]
"""Values by name, in groups."""


class Control(NamedTuple):
    """One control of a public catalogue, and how far this audit speaks to it."""

    id: str
    catalogue: str
    asks: str
    status: Status
    why: str
    where: str
    """The part of the page with the figures; empty where there are none."""


Judge = Callable[[Report], tuple[Status, str, str]]
"""Gives status, why, and where of one control."""


def controls(report: Report) -> list[Control]:
    """All controls that concern the extraction of a model, in the order of `CATALOGUE`."""
    return [Control(*named, *judge(report)) for named, judge in CATALOGUE.items()]


def _outputs(report: Report) -> tuple[Status, str, str]:
    if why := _unmeasured(report):
        return "not assessed", why, "thieves"
    leak = report.verdict.leak
    if leak is not None and is_above_zero(leak):
        return "partly", f"Leakage was measured, and remains: {beyond_labels(report.verdict)}.", "thieves"
    if not protection(report):
        limits = (
            "Whether anything limits answers is not known." if report.pairs[0].reached else "Nothing limits answers."
        )
        return "partly", f"Leakage was measured: {beyond_labels(report.verdict)}. {limits}", "thieves"
    if not adapts(report):
        return "partly", f"By plain thieves, {beyond_labels(report.verdict)}; none that adapts was tried.", "thieves"
    return "met", f"Leakage was measured by thieves who adapt: {beyond_labels(report.verdict)}.", "thieves"


def _patterns(report: Report) -> tuple[Status, str, str]:
    if within := queries_within(report):
        counts = ", ".join(f"{queries:,} ({points(float(gap))})" for gap, queries in within.items())
        return (
            "partly",
            f"Counts at which a copy comes near were measured: {counts}. What watches is not seen.",
            "queries",
        )
    return "not assessed", "An audit does not see what watches the interface; undistill serve logs such events.", ""


def _quantity(report: Report) -> tuple[Status, str, str]:
    if harmless(report) == 0:
        return "partly", "Even the fewest queries that were tried bought a good copy: no budget was found.", "queries"
    if report.curve:
        return (
            "partly",
            "The budget that keeps copies away was measured; whether one is enforced is not seen.",
            "queries",
        )
    if budget := _budget(report):
        return "partly", f"Thieves had a budget of {budget:,} queries; whether one is enforced is not seen.", "thieves"
    return "not assessed", "No budget was tried; undistill audit --curve sizes one.", "thieves"


def _extraction(report: Report) -> tuple[Status, str, str]:
    tried = {cell.column[1] for cell in report.cells if cell.side == "victim"}
    if why := _unmeasured(report):
        return "partly", f"{len(tried)} attacks were tried. {why}", "thieves"
    if adapts(report):
        return "met", f"{len(tried)} attacks were tried, tuned, some of them made against defences.", "thieves"
    return (
        "partly",
        f"{len(tried)} attacks were tried; standard-1 and thorough-1 try some that adapt and tune.",
        "thieves",
    )


def _theft(report: Report) -> tuple[Status, str, str]:
    if why := _unmeasured(report):
        return "not assessed", why, "decision"
    return (
        "partly",
        f"The decision is: {decide(report).choice}. Access control and watermarks are not seen.",
        "decision",
    )


def _obfuscation(report: Report) -> tuple[Status, str, str]:
    status, why, where = _outputs(report)
    if not protection(report) and status != "not assessed":
        return "not assessed", "It is not known that anything changes the answers of this model.", "made"
    return status, why, where


def _unseen(what: str) -> Judge:
    return lambda report: ("not assessed", f"An audit of answers does not see {what}.", "")


AISVS, ATLAS = "OWASP AISVS 1.0", "MITRE ATLAS 5.6.1"
CATALOGUE: dict[tuple[str, str, str], Judge] = {
    ("v1.0-C11.3.1", AISVS, "query patterns are analysed, and feed a detector of extraction"): _patterns,
    ("v1.0-C11.3.2", AISVS, "answers show no more than is needed, by a measured risk of extraction"): _outputs,
    ("v1.0-C11.3.3", AISVS, "a watermark or fingerprint, where feasible"): _unseen("watermarks"),
    ("v1.0-C11.3.4", AISVS, "a detection triggers a response"): _unseen("what follows an event"),
    ("AML.T0024.002", ATLAS, "technique: extraction of a model by its answers; whether it was tried"): _extraction,
    ("AML.M0002", ATLAS, "obfuscate outputs"): _obfuscation,
    ("AML.M0004", ATLAS, "restrict the number of queries"): _quantity,
    ("AML.M0019", ATLAS, "control access"): _unseen("who has access"),
    ("AML.M0024", ATLAS, "log telemetry"): _unseen("logs"),
    ("ML05:2023", "OWASP ML Top 10", "model theft"): _theft,
}


def fields(report: Report) -> Fields:
    """Fields of an audit for a review, in groups; None is not known or not assessed."""
    thief = students_of(report.cells)[best_thief(report)]
    first, pair = next(iter(thief.values())), report.pairs[0]
    asked = [cell for cell in report.cells if cell.queries]
    verdict, costs = report.verdict, report.costs
    return {
        "model": {
            "name": report.victim.spec,
            "SHA-256": [pair.victim_sha256 for pair in report.pairs],
            "data": report.data,
            "SHA-256 of data": pair.data_sha256,
            "test images": pair.test_images,
            "accuracy": report.victim.accuracy,
            "NLL": report.victim.nll,
            "ECE": report.victim.ece,
        },
        "defence": {
            "name": protection(report) or None,
            "version": report.environment.get("undistill"),
            "SHA-256 of all on which answers depend": [pair.identity for pair in report.pairs if pair.identity],
            "keeps state between queries": False if not pair.reached else None,
            "answers vary": pair.answers_vary,
            "top answers kept": 1 - fmean(pair.flips for pair in report.pairs) if not pair.reached else None,
            "form of answers": pair.form or (pair.reached.form if pair.reached else None),
        },
        "threat (best thief)": {
            "attack": first.attack,
            "student": first.student,
            "access": first.threat.access if first.threat else None,
            "data": first.threat.data.value if first.threat else None,
            "images": first.threat.images if first.threat else None,
            "way of asking": first.threat.buying.value if first.threat else None,
            "query budget": first.budget,
            "of them among the test images": _overlap(report),
        },
        "attacks": {
            "suite": report.suite,
            "tried": len({cell.column[1] for cell in report.cells}),
            "settings tried": len(report.trials),
            "chosen on": "validation images",
            "seeds": verdict.kd_gain.n,
            "students": sorted({cell.student for cell in report.cells}),
            "left out": report.skipped,
            "hours of training": round(_hours(report), 3),
        },
        "queries by ledger": {
            "most of one thief": max((cell.queries for cell in asked), default=0),
            "distinct among them": _distinct(asked),
            "of all students": sum(cell.queries for cell in report.cells),
            "billed by the black box": pair.reached.billed if pair.reached else None,
            "for measuring": sum(cell.evaluation for cell in report.cells),
        },
        "results": {
            "accuracy of the best copy": _mean_of(list(columns(report.cells)[best_thief(report)].values())),
            "agreement of the best copy": _mean_of([cell.fidelity for cell in thief.values()]),
            "leak": _of(verdict.leak),
            "leak_hard": _of(verdict.leak_hard),
            "leak_label_smoothing": _of(verdict.leak_label_smoothing),
            "kd_gain": _of(verdict.kd_gain),
            "damage": _of(verdict.damage),
            "floors": _floors(report),
            "curve": _curve(report),
            "queries that bought a copy within": queries_within(report) or None,
            "verdict": verdict.sentence,
        },
        "utility": {
            "accuracy lost": _of(verdict.cost),
            "NLL gained": costs and costs.nll,
            "ECE gained": costs and costs.ece,
            "L1 to the unprotected answers": costs and costs.l1,
            "ms a query": costs and costs.ms_per_query_victim,
            "seconds of training": costs and costs.train_seconds,
            "stated price in points": pair.price,
        },
        "bound": {
            "bits beyond the label, at most": verdict.bits,
            "assumes": None
            if verdict.bits is None
            else "that answers leave through the responses alone, and not the file",
        },
        "complements": {"watermark or fingerprint": "not assessed", "monitoring of queries": "not assessed"},
        "limits of this audit": {
            "protected models": len(report.pairs),
            "flags": [flag.name for flag in report.flags],
            "machine": "; ".join(f"{name} {value}" for name, value in report.environment.items()),
            "date": report.made,
            "by": report.by,
        },
    }


def written(report: Report, digest: str) -> dict[str, Any]:
    """The whole of controls.json; `digest` is the SHA-256 of report.json, from which all of it is made."""
    return {
        "format": 1,
        "report_sha256": digest,
        "decision": decide(report)._asdict(),
        "fields": fields(report),
        "controls": [
            one._asdict() | {"where": f"report.html#{one.where}" if one.where else None} for one in controls(report)
        ],
    }


def told(value: Any) -> str:
    """A field for people."""
    if value is None or value == "":
        return "not assessed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and "mean" in value:
        ends = [value.get(name) for name in ("low", "high")] if "low" in value else [value["lowest"], value["highest"]]
        spread = f" ({ends[0]:.4f} to {ends[1]:.4f})" if None not in ends else ""
        return f"{value['mean']:.4f}{spread}, n = {value['n']}"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {told(held)}" for name, held in value.items()) or "none"
    return ", ".join(map(told, value)) or "none" if isinstance(value, list) else str(value)


def _hours(report: Report) -> float:
    return (sum(cell.seconds for cell in report.cells) + sum(trial.seconds for trial in report.trials)) / 3600


def _unmeasured(report: Report) -> str:
    """Why it is not known what answers give beyond labels; empty where it is."""
    if report.verdict.kd_gain.n < FEW:
        return f"Leakage was not measured with {FEW} seeds or more."
    return "" if report.verdict.leak is not None else "Leakage was not assessed: its floors had fewer images."


def _overlap(report: Report) -> int | None:
    """Images of the thief that are test images: none, but where data are used as published, copies and all."""
    try:
        return None if Source.parse(report.data).published else 0
    except UndistillError:  # code of somebody else, which no page may execute
        return None


def _floors(report: Report) -> dict[str, Any]:
    """Accuracy of the students beside whom thieves are read, by role."""
    found: dict[str, list[float]] = {}
    for cell in report.cells:
        if cell.role in FLOORS:
            found.setdefault(cell.role.value, []).append(cell.accuracy)
    return {role: _mean_of(values) for role, values in found.items()}


def _curve(report: Report) -> dict[str, Any] | None:
    """Accuracy and agreement of copies of the model by queries, of every thief of the curve."""
    found = {
        f"{line.attack}, {queries:,} queries": {
            "accuracy": fmean(cell.accuracy for cell in cells),
            "agreement": fmean(cell.fidelity for cell in cells),
        }
        for line in lines(report.curve)
        if line.side == "victim"
        for queries, cells in line.cells.items()
    }
    return found or None


def _budget(report: Report) -> int | None:
    return max((cell.budget for cell in report.cells if cell.budget is not None), default=None)


def _distinct(asked: list[Cell]) -> int:
    return max(asked, key=lambda cell: cell.queries).distinct if asked else 0


def _mean_of(values: list[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "lowest": min(values), "highest": max(values), "n": len(values)}


def _of(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else found.model_dump()
