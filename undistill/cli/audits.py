"""`demo`, `audit` and `report`: commands that end with a verdict."""

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
    DataDir,
    Device,
    DryRun,
    Fast,
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
    beside,
    build_launcher,
    say,
    working,
)
from undistill.core.errors import legible

if TYPE_CHECKING:
    from undistill.auditing.schema import Report


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
    run: Annotated[Path, typer.Argument(help="The run folder of the protected model.")],
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
    """Attack a protected model and its honest twin; ends with a report."""
    from undistill.api import audit as work
    from undistill.api import plan_audit
    from undistill.auditing.forecast import describe, forecast
    from undistill.auditing.pair import VictimPair
    from undistill.cli.config import merge, read_settings
    from undistill.runs.settings import AuditSettings, recorded_settings

    pair = VictimPair.of(run, honest, (), model)
    recipe = recorded_settings(pair.honest or pair.victim).recipe
    chosen = AuditSettings(**merge({"recipe": recipe.model_dump()}, read_settings(config, settings, fast)))
    out = out or beside(run, "audit")
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
    if dry_run:
        plan = plan_audit(pair.victim, **asked)
        say(describe(plan, cells or out / "cells"))
        say(str(forecast(plan, cells or out / "cells")))
        return
    with working() as progress:
        found = work(
            pair.victim,
            out,
            by=by,
            launcher=build_launcher(launcher, workers, address),
            cells=cells,
            progress=progress,
            **asked,
        )
    show(found, out)


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
