"""`audit`: from a victim to a report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from undistill.attacks.attack import Attack, ThiefData, bought_once
from undistill.auditing import MOST_SEEDS
from undistill.auditing.cell import Job
from undistill.auditing.curve import curve_jobs
from undistill.auditing.forecast import describe
from undistill.auditing.launchers import Launcher
from undistill.auditing.pair import NO_TWIN, QueryOptions, VictimPair
from undistill.auditing.plan import Plan
from undistill.auditing.schema import Report
from undistill.auditing.suites import Tuning, find_suite
from undistill.auditing.summary import judge_of, summarise
from undistill.auditing.tuning import tune
from undistill.auditing.verdict import Judge
from undistill.core import distributed
from undistill.core.errors import SpecError, StoreError
from undistill.core.progress import Progress
from undistill.data.arrays import Images, stored
from undistill.data.source import Source
from undistill.defences.defence import Defence
from undistill.models.model import Model
from undistill.report.evidence import Pictured, read_curve, write_evidence
from undistill.runs.contact import Contact
from undistill.runs.folder import claim, sweep_below
from undistill.runs.run import Run
from undistill.runs.settings import recorded_settings
from undistill.training.answers import REMEMBER
from undistill.training.compute import pick_device
from undistill.training.recipe import Recipe
from undistill.victims.black_box import BlackBox, is_black_box


def audit(
    victim: str | Path | Run | BlackBox,
    out: str | Path,
    *,
    data: Images | None = None,
    honest: str | Path | Run | None = None,
    suite: str = "quick-2",
    attacks: Sequence[str | Attack] = (),
    students: Sequence[str | Model] = (),
    seeds: int = 3,
    trials: int | None = None,
    share: float | None = None,
    curve: bool = False,
    by: str = "",
    recipe: Recipe | None = None,
    model: str | Model | nn.Module | Callable[..., nn.Module] | None = None,
    defences: Sequence[str | Defence] = (),
    budget: int | None = None,
    pool: Images | None = None,
    device: str = "auto",
    launcher: str | Launcher = "Serial",
    remember: float = REMEMBER,
    cells: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Audit one victim; writes report.json, report.html and report.md into `out`.

    Args:
        victim: the run folder of the protected model; or a black box, such as `Onnx('model.onnx')`.
        data: images of the kind that a black box sorts, as for `train`; a run names its own.
        out: where the result goes; cells that it already holds are not done again.
        honest: the run folder of the unprotected twin, by default the run that the victim was protected from; 'none'
            audits without one.
        suite: a listed suite of attacks and students.
        attacks: more attacks, beside the suite's.
        students: networks of the thief, instead of the suite's.
        seeds: students of each kind.
        trials: settings that each thief tries before, instead of as many as the suite says.
        share: share of the epochs for which a trial trains, instead of the suite's.
        curve: whether to measure, too, how good a copy 100, 300, 1,000, ... queries buy.
        by: whoever audits, for the page.
        recipe: how students are trained, by default as the honest network was.
        model: the user's own network, named again, since a stored run may not execute code by itself.
        defences: responses of the user's own, named again for the same reason.
        budget: the most queries that a thief may make. Who asks for every view gets fewer images for it than who buys
            each answer once; None is unlimited.
        pool: images of thieves who have none of the owner's, as for `train`.
        device: auto, cpu, cuda or cuda:N.
        launcher: where cells are done: `Serial`, `Pool(workers=2)`, `Ray(address='auto')`.
        remember: GiB of disk that the answers of each network may fill, in its run folder.
        cells: where finished students are kept, `out`/cells by default; audits that share it share those.
        ledger: where the answers of a black box are kept, `out`-bought by default; audits that share it pay once.
        progress: True shows it on standard error, False nowhere; None shows it in a notebook.
    """
    launcher = Launcher.from_user(launcher)
    plan = plan_audit(
        named_victim(victim, data, Path(out), ledger, Contact.make),
        honest=honest,
        suite=suite,
        attacks=attacks,
        students=students,
        seeds=seeds,
        trials=trials,
        share=share,
        curve=curve,
        recipe=recipe,
        model=model,
        defences=defences,
        budget=budget,
        pool=None if pool is None else stored(pool, out),
        device=device,
        remember=remember,
    )
    plan.jobs[0].pair.require_finite()
    place = Path(cells) if cells else Path(out) / "cells"
    with claim(Path(out), request_of(plan)), alone_in(place), Progress.of(progress) as shown, launcher.ready():
        shown.say(describe(plan, place))
        return perform(plan, Path(out), launcher, shown, by, place)


def named_victim(
    victim: str | Path | Run | BlackBox,
    data: Images | None,
    out: Path,
    ledger: str | Path | None,
    contact: Callable[[str | BlackBox, Images, Path], Contact],
) -> str | Path | Run | Contact:
    """The victim of an audit: a run as it is, a black box by way of `contact`."""
    if isinstance(victim, BlackBox) or (isinstance(victim, str) and is_black_box(victim)):
        if data is None:
            raise SpecError("A black box does not say on which images it works; name them: --data DATA.")
        return contact(victim, data, Path(ledger) if ledger else out.with_name(f"{out.name}-bought"))
    if data is not None or ledger is not None:
        raise SpecError(f"{victim} is a run folder, whose record names its data; leave out --data and --ledger.")
    return victim


def request_of(plan: Plan) -> dict[str, str]:
    """The request by which the folder of an audit is claimed."""
    pair = plan.jobs[0].pair
    twin = pair.honest.digest if pair.honest else NO_TWIN
    request = {"command": "audit", "victim": pair.victim.digest, "honest": twin}
    if pair.victim.record.get("responses"):  # over the same weights there may be others
        request["victim_identity"] = pair.victim.identity
    return request


@contextmanager
def alone_in(cells: Path) -> Iterator[None]:
    """Inside, this command alone makes cells in that folder."""
    cells.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cells / ".lock", timeout=0):
            sweep_below(cells)
            yield
    except Timeout:
        raise StoreError(f"Another audit is working in {cells}; wait for it, or name another --cells.") from None


def plan_audit(
    victim: str | Path | Run | Contact,
    *,
    honest: str | Path | Run | None = None,
    suite: str = "quick-2",
    attacks: Sequence[str | Attack] = (),
    students: Sequence[str | Model] = (),
    seeds: int = 3,
    trials: int | None = None,
    share: float | None = None,
    curve: bool = False,
    recipe: Recipe | None = None,
    model: str | Model | nn.Module | Callable[..., nn.Module] | None = None,
    defences: Sequence[str | Defence] = (),
    budget: int | None = None,
    pool: str | Source | None = None,
    device: str = "auto",
    remember: float = REMEMBER,
    strict: bool = True,
) -> Plan:
    """The plan of an audit, of which nothing is done yet; the arguments are those of `audit`.

    What cannot be loaded, or attacked, is said here, before work is done. Unless `strict`, attacks that were named and
    cannot be tried are left out, as those of a suite are.
    """
    distributed.require_one("audit")
    if not 1 <= seeds <= MOST_SEEDS:
        raise SpecError(f"An audit takes 1 to {MOST_SEEDS} seeds; seeds = {seeds}.")
    if budget is not None and budget < 1:
        raise SpecError(f"A budget is at least one query; budget = {budget}. Leave it out for as many as are asked.")
    for defence in defences:
        Defence.from_user(defence)
    pair = VictimPair.of(victim, honest, range(seeds), model, str(Source.from_user(pool)) if pool else "")
    recipe = recipe or recorded_settings(pair.honest or pair.victim).recipe
    pair = replace(pair, options=QueryOptions(pick_device(device), recipe.compute, remember))
    plan = Plan.of([pair], suite, attacks, students, recipe, budget, tuning_of(suite, trials, share), curve)
    named = [Attack.from_user(attack) for attack in attacks] if strict else []
    named += [bought_once(attack) for attack in named]  # as which recorded answers are asked
    if pool and not any(job.attack.data == ThiefData.SURROGATE for job in plan.jobs):
        raise SpecError(
            "No attack here asks about a pool; name one, such as --attack 'Knockoff()', or leave --pool out."
        )
    return plan.possible(named)


def tuning_of(suite: str, trials: int | None, share: float | None) -> Tuning:
    """How hard thieves tune: as the suite says, or as the user does."""
    asked = {name: value for name, value in (("trials", trials), ("share", share)) if value is not None}
    return Tuning(**(find_suite(suite).tuning.model_dump() | asked))


def perform(
    plan: Plan, out: Path, launcher: Launcher, progress: Progress, by: str = "", cells: Path | None = None
) -> Report:
    """Let thieves tune, train what is not there yet, then write one report over all cells."""
    return judged(plan, out, launcher, progress, by, cells)[0]


def judged(
    plan: Plan, out: Path, launcher: Launcher, progress: Progress, by: str, cells: Path | None = None
) -> tuple[Report, Judge]:
    """The report of `perform`, and the judge who made it, who holds the students' answers as well."""
    from undistill.report.page import write_report

    cells = cells or out / "cells"
    trials, best = tune(plan.searched, plan.tuning, launcher, cells, progress)
    jobs = plan.tuned(best)
    students = launcher.run(jobs, cells, progress)
    pairs = list(dict.fromkeys(job.pair for job in jobs))
    last = max((cells / f"{job.key}.json").stat().st_mtime for job in jobs)
    made = datetime.fromtimestamp(last, UTC).date().isoformat()
    judge = judge_of(pairs, students, trials)
    report = summarise(pairs, judge, plan, made=made, by=by)
    if plan.curve:
        bought = curve_jobs(plan, best, report.verdict.worst_attack, report.verdict.worst_student)
        points = launcher.run(bought, cells, progress)
        report = report.model_copy(update={"curve": [cell.model_copy(update={"predictions": ""}) for cell in points]})
    _write_evidence(pairs[0], jobs, cells, out)
    report = timed_before(report, out)
    write_report(report, out)
    return report, judge


def _write_evidence(pair: VictimPair, jobs: Sequence[Job], cells: Path, out: Path) -> None:
    """Store the data of the page's pictures, of the first pair."""
    from undistill.report.figures import label

    sheets: dict[str, Path] = {}
    for job in jobs:
        if (sheet := job.sheet(cells)).exists():
            sheets.setdefault(label(job.column), sheet)
    named = {"honest": "unprotected", "victim": "protected"}
    curves = {named[side]: read_curve(run) for side, run in pair.runs.items()}
    models = {side: Pictured(pair.test_logits(side).__getitem__, pair.network(side)) for side in pair.sides}
    write_evidence(out / "evidence.npz", pair.data, models, sheets, curves)


def timed_before(report: Report, out: Path) -> Report:
    """The report with the times per query that one over the same models has in `out`, where there is one.

    They are the only values that are measured anew; so a finished audit ends with the same bytes.
    """
    from undistill.report.page import read_report

    try:
        before = read_report(out)
    except StoreError:
        return report
    if any(getattr(before, name) != getattr(report, name) for name in ("pairs", "environment", "recipe")):
        return report
    if before.costs is None or report.costs is None:
        return report
    times = before.costs.model_dump(include={"ms_per_query_victim", "ms_per_query_honest"})
    return report.model_copy(update={"costs": report.costs.model_copy(update=times)})
