"""`demo`, `audit` and `report`: commands that end with a verdict."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undistill.auditing import MOST_SEEDS
from undistill.cli.options import (
    Address,
    Attacks,
    AuditOut,
    Budget,
    By,
    Code,
    Config,
    Cost,
    DataDir,
    Device,
    DryRun,
    Fast,
    Ledger,
    OwnDefence,
    Pool,
    Remember,
    Seeds,
    Set,
    Share,
    Students,
    Trials,
    Where,
    Workers,
    Yes,
    beside,
    build_launcher,
    say,
    working,
)
from undistill.core.errors import SpecError, legible

if TYPE_CHECKING:
    from undistill.auditing.plan import Plan
    from undistill.auditing.schema import Report
    from undistill.runs.contact import Contact


def demo(
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("runs/demo"),
    seeds: Annotated[
        int, typer.Option(min=1, max=MOST_SEEDS, help="Repetitions of everything: split, teachers, students.")
    ] = 3,
    device: Device = "auto",
) -> None:
    """Train, protect and audit on handwritten digits; ends with a report."""
    from undistill.cli.demo import demo as run

    with working() as progress:
        report = run(out, seeds, progress, device)
    show(report, out)


def audit(
    victim: Annotated[
        str, typer.Argument(help="The run folder of the protected model, or a black box, such as Onnx('model.onnx').")
    ],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Images on which a black box works; a run names its own.")
    ] = None,
    honest: Annotated[
        str | None, typer.Option(help="Its unprotected twin, or none; by default the run it was protected from.")
    ] = None,
    suite: Annotated[str, typer.Option(help="A listed suite of attacks.")] = "quick-2",
    attack: Attacks = None,
    student: Students = None,
    seeds: Seeds = 3,
    trials: Trials = None,
    share: Share = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Measure how good a copy 100, 300, 1,000, ... queries buy.")
    ] = False,
    budget: Budget = None,
    pool: Pool = None,
    out: AuditOut = None,
    cells: Annotated[
        Path | None, typer.Option(help="Finished students, shared by audits.", show_default="OUT/cells")
    ] = None,
    ledger: Ledger = None,
    cost: Cost = None,
    yes: Yes = False,
    by: By = "",
    dry_run: DryRun = False,
    model: Code = None,
    defence: OwnDefence = None,
    config: Config = None,
    settings: Set = None,
    fast: Fast = False,
    device: Device = "auto",
    launcher: Where = "serial",
    workers: Workers = None,
    address: Address = None,
    data_dir: DataDir = None,
    remember: Remember = 4.0,
) -> None:
    """Attack a protected model, beside its honest twin where there is one; ends with a report."""
    from undistill.api import audit as work
    from undistill.api.audits import named_victim, plan_audit
    from undistill.auditing.forecast import describe, forecast
    from undistill.auditing.pair import VictimPair
    from undistill.cli.config import merge, read_settings
    from undistill.runs.contact import Contact
    from undistill.runs.settings import AuditSettings, recorded_settings

    out = out or default_out(victim)
    asked_about = named_victim(victim, data, out, ledger, Contact.planned)
    pair = VictimPair.of(asked_about, honest, (), model)
    recipe = recorded_settings(pair.honest or pair.victim).recipe
    chosen = AuditSettings(**merge({"recipe": recipe.model_dump()}, read_settings(config, settings, fast)))
    asked: dict[str, Any] = {
        "honest": honest,
        "suite": suite,
        "attacks": attack or (),
        "students": student or (),
        "seeds": seeds,
        "trials": trials,
        "share": share,
        "curve": curve,
        "recipe": chosen.recipe,
        "model": model,
        "defences": defence or (),
        "budget": budget,
        "pool": pool,
        "device": device,
        "remember": remember,
    }
    place = cells or out / "cells"
    if dry_run or isinstance(pair.victim, Contact):
        plan = plan_audit(pair.victim, **asked)
        if isinstance(pair.victim, Contact):
            require_consent(plan, place, pair.victim, cost, yes or dry_run)
        if dry_run:
            say(describe(plan, place))
            say(str(forecast(plan, place)))
            return
    with working() as progress:
        found = work(
            pair.victim.spec if isinstance(pair.victim, Contact) else pair.victim,
            out,
            data=data,
            ledger=ledger,
            by=by,
            launcher=build_launcher(launcher, workers, address),
            cells=cells,
            progress=progress,
            **asked,
        )
    show(found, out)


def default_out(victim: str) -> Path:
    """Where an audit goes that names no place: beside the run, or below runs/ for a black box."""
    from undistill.core.identity import fingerprint
    from undistill.victims.black_box import is_black_box

    if not is_black_box(victim):
        return beside(Path(victim), "audit")
    return Path("runs") / f"audit-{victim.partition('(')[0].rpartition(':')[2].lower()}-{fingerprint(victim)[:6]}"


MANY = 10_000  # answers that are bought without a question


def require_consent(plan: "Plan", cells: Path, victim: "Contact", cost: float | None, yes: bool) -> None:
    """Say how many answers will be bought, and for how much; ask where they are many and somebody may be paid."""
    from undistill.auditing.forecast import queries

    number = queries(plan, cells)
    price = "" if cost is None else f", which costs at most {number / 1000 * cost:,.2f}"
    say(f"At most {number:,} answers will be bought{price}; {victim.purchases.distinct:,} are there already.")
    if yes or not victim.spec.billed or number <= MANY:
        return
    if not sys.stdin.isatty():
        raise SpecError(f"More than {MANY:,} answers are not bought without a word: add --yes, or lower --budget.")
    typer.confirm("Buy them?", abort=True)


def report(
    folder: Annotated[Path, typer.Argument(help="Where an audit or demo wrote its report.")],
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Make the pages of an audit or comparison again from their JSON, and show the table."""
    import webbrowser

    from undistill.cli import comparing
    from undistill.report.comparison import read_comparison, render_comparison
    from undistill.report.page import read_report, render

    if (folder / "comparison.json").exists():
        page = render_comparison(folder)
        comparing.show(read_comparison(folder), folder)
    else:
        page = render(folder)
        show(read_report(folder), folder)
    if open_:
        webbrowser.open(page.resolve().as_uri())


def show(report: "Report", folder: Path) -> None:
    """The verdict and its table, at most 80 columns wide, and where the rest lies."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from undistill.report.page import percent, points, table

    console = Console(highlight=False)
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("student taught by", "accuracy", "agrees", "queries"):
        rows.add_column(name, justify="left" if name == "student taught by" else "right")
    for side, teacher in (("protected", report.victim), ("unprotected", report.honest)):
        if teacher:
            rows.add_row(f"({side} model itself)", percent(teacher.accuracy), "", "")
    for row in table(report):
        rows.add_row(escape(legible(row["attack"])), row["accuracy"], row["fidelity"], row["queries"])
    console.print(rows)
    verdict = report.verdict
    sentence = escape(legible(verdict.sentence))
    beside = report.twin and (
        f"damage {points(report.twin.damage)}, cost {points(report.twin.cost)}, gain of a student of the unprotected "
        f"model {points(report.twin.kd_gain_honest)}, "
    )
    console.print(
        f"\n{sentence}\n\nIn points: {beside or ''}worst case against top answers {points(verdict.leak_hard)}, "
        f"gain of imitating {points(verdict.kd_gain)}."
    )
    for flag in report.flags:
        console.print(f"Read with care: {legible(flag.message)}", style="yellow", markup=False)
    console.print(f"\nReport: {legible(str(folder / 'report.html'))}", soft_wrap=True, markup=False)
