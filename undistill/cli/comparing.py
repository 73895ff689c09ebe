"""`compare`: several defences of one network, audited by one suite."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undistill.cli.options import (
    Address,
    Attacks,
    Budget,
    By,
    Code,
    CompareOut,
    Config,
    DataDir,
    Device,
    DryRun,
    Fast,
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
    from undistill.auditing.comparison import Comparison


def compare(
    run: Annotated[Path, typer.Argument(help="The run folder of the unprotected model.")],
    defence: Annotated[
        list[str],
        typer.Option(help='A row: one defence, or several as "Nasty(price=0.5) + Sealed(levels=4)"; repeatable.'),
    ],
    suite: Annotated[str, typer.Option(help="A listed suite of attacks.")] = "standard-1",
    attack: Attacks = None,
    student: Students = None,
    seeds: Seeds = 3,
    trials: Trials = None,
    share: Share = None,
    budget: Budget = None,
    pool: Pool = None,
    out: CompareOut = None,
    by: By = "",
    dry_run: DryRun = False,
    model: Code = None,
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
    """Protect a model by several defences, and audit each beside the unprotected model; ends with one table.

    Settings (--config, --set) are those of the students; the defences train as the unprotected model was.
    """
    from undistill.api import compare as work
    from undistill.api.comparisons import describe_comparison
    from undistill.cli.config import merge, read_settings
    from undistill.runs.run import Run
    from undistill.runs.settings import AuditSettings, recorded_settings

    honest = Run.open(run)
    recipe = recorded_settings(honest).recipe
    chosen = AuditSettings(**merge({"recipe": recipe.model_dump()}, read_settings(config, settings, fast)))
    out = out or beside(run, "compare")
    options: dict[str, Any] = {
        "suite": suite,
        "attacks": attack or (),
        "students": student or (),
        "seeds": seeds,
        "trials": trials,
        "share": share,
        "recipe": chosen.recipe,
        "model": model,
        "budget": budget,
        "pool": pool,
        "device": device,
        "remember": remember,
    }
    if dry_run:
        say(describe_comparison(honest, defence, out, **options))
        return
    with working() as progress:
        found = work(
            honest,
            defence,
            out,
            by=by,
            launcher=build_launcher(launcher, workers, address),
            progress=progress,
            **options,
        )
    show(found, out)


def show(comparison: "Comparison", folder: Path) -> None:
    """The table, at most 80 columns wide, and where the rest lies."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from undistill.report.page import percent, points

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("defence", "cost", "leak", "ECE", "bits", "best copy"):
        table.add_column(name, justify="left" if name == "defence" else "right", overflow="fold")
    for row in comparison.rows:
        mark = " *" if row.not_shippable else ""
        bits = "–" if row.bits is None else f"{row.bits:.3g}"
        leak, ece = points(row.leak_hard), f"{100 * row.victim.ece:.1f} %"
        table.add_row(
            escape(legible(row.defence)) + mark, points(row.cost), leak, ece, bits, percent(row.best_accuracy)
        )
    console.print(table)
    console.print(
        "\nIn points: cost is accuracy lost, leak is the worst thief minus one who copies top answers, with half of "
        "its 95 % interval. Bits: the most that an answer carries beyond its label."
    )
    for row in comparison.rows:
        if row.not_shippable:
            why = "; ".join(row.not_shippable)
            console.print(f"* {legible(row.defence)}: {legible(why)}", style="yellow", markup=False)
    console.print(f"\nPage: {legible(str(folder / 'comparison.html'))}", soft_wrap=True, markup=False)
