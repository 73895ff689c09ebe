"""The report over finished cells: models measured, costs, verdict, flags."""

import statistics
from collections.abc import Sequence

from undistill.auditing.flags import raised
from undistill.auditing.measure import accuracy_cost, average, measure_costs, measure_pair
from undistill.auditing.pair import VictimPair
from undistill.auditing.plan import Plan
from undistill.auditing.schema import Cell, Pair, Report, Trial
from undistill.auditing.tuning import proposals
from undistill.auditing.verdict import Judge
from undistill.auditing.wording import TITLE, UNPROTECTED
from undistill.data.source import Source
from undistill.runs.contact import Contact
from undistill.runs.environment import environment


def judge_of(pairs: Sequence[VictimPair], cells: Sequence[Cell], trials: Sequence[Trial]) -> Judge:
    """The judge of finished cells; he compares image by image where all pairs have the same test images."""
    test = pairs[0].data.test
    same = len({pair.data.test.digest for pair in pairs}) == 1
    return Judge(cells, trials, len(test), pairs[0].data.num_classes, test.labels.numpy() if same else None)


def summarise(pairs: Sequence[VictimPair], judge: Judge, plan: Plan, *, made: str, by: str) -> Report:
    """The report over finished cells, with the flags that apply to it, `made` on a date `by` somebody."""
    measured = [measure_pair(pair) for pair in pairs]
    twins = [pair.honest for pair in measured if pair.honest]
    diverged = [pair.divergence for pair in measured if pair.divergence is not None]
    first = pairs[0].victim.record
    black_box = isinstance(pairs[0].victim, Contact)
    protection = ", ".join(first.get("defences", ())) or (first["model"] if black_box else UNPROTECTED)
    report = Report(
        title=f"{TITLE}{protection}",
        by=by,
        made=made,
        data=first["data"],
        classes=len(first["classes"]),
        class_names=first["classes"],
        suite=plan.suite,
        tuning=str(plan.tuning),
        searched_by=proposals({}, 0).name if len(judge.trials) > len(plan.searched) else "",
        skipped=dict(plan.skipped),
        recipe=str(plan.jobs[0].recipe),
        victim=average([pair.victim for pair in measured]),
        honest=average(twins) if twins else None,
        pairs=measured,
        cells=[cell.model_copy(update={"predictions": ""}) for cell in judge.cells],
        trials=list(judge.trials),
        divergence=statistics.fmean(diverged) if diverged else None,
        costs=measure_costs(pairs, measured),
        verdict=judge.verdict(accuracy_cost(pairs, measured), Source.parse(first["data"]).title, most_bits(measured)),
        flags=[],
        environment=environment(pairs[0].options.device),
    )
    return report.model_copy(update={"flags": raised(report)})


def most_bits(pairs: Sequence[Pair]) -> float | None:
    """The bound that holds for every victim; None where one has none."""
    bounds = [pair.bits for pair in pairs]
    return None if None in bounds else max(bound for bound in bounds if bound is not None)
