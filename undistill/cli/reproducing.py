"""`reproduce`: the paper's tables and ablations."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from undistill.auditing import MOST_SEEDS
from undistill.cli.options import (
    Address,
    DataDir,
    Device,
    DryRun,
    Remember,
    Where,
    Workers,
    build_launcher,
    say,
    working,
)
from undistill.core.errors import legible

log = logging.getLogger(__name__)


def reproduce(
    name: Annotated[str, typer.Argument(help="An experiment, or 'list'.")] = "list",
    scale: Annotated[
        str, typer.Option(help="smoke (digits), small (two cores), gpu (minutes on one), paper (as published).")
    ] = "small",
    seeds: Annotated[int, typer.Option(min=1, max=MOST_SEEDS, help="Repetitions of everything.")] = 1,
    cells: Annotated[str, typer.Option(help="Only values whose name matches, such as '*CNN'.")] = "*",
    select_on_test: Annotated[
        bool,
        typer.Option("--select-on-test", help="Keep the epoch best on the test images, as the authors' code does."),
    ] = False,
    as_authors: Annotated[bool, typer.Option("--as-authors", hidden=True)] = False,
    out: Annotated[Path, typer.Option(help="Where teachers and cells are kept, for all experiments.")] = Path(
        "runs/reproduce"
    ),
    dry_run: DryRun = False,
    launcher: Where = "serial",
    workers: Workers = None,
    address: Address = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    remember: Remember = 4.0,
) -> None:
    """Measure the paper's tables and ablations, beside what it reports."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    from undistill.papers import reproduce as experiments
    from undistill.papers.case import Runner
    from undistill.papers.tables import HARDWARE
    from undistill.training.compute import pick_device

    if as_authors:
        log.warning("The option --as-authors is now called --select-on-test; the old name is accepted in this version.")
    select_on_test |= as_authors
    console = Console(highlight=False)
    if name == "list":
        for known, experiment in experiments.EXPERIMENTS.items():
            console.print(f"[bold]{known}[/]")
            console.print(Padding(experiments.about(experiment), (0, 0, 0, 2)), markup=False)
        console.print(f"\n{HARDWARE}", style="dim")
        return
    with working() as progress:
        runner = Runner(out, build_launcher(launcher, workers, address), pick_device(device), progress, remember)
        rows = experiments.reproduce(
            name, scale, range(seeds), cells, runner, select_on_test=select_on_test, dry_run=say if dry_run else None
        )
    if dry_run:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, header in enumerate(experiments.HEADER):
        table.add_column(header, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    console.print(f"\n{experiments.caveat(rows)}")
    suffix = "-selected-on-test" if select_on_test else ""
    console.print(f"\nTable: {legible(str(out / f'{name}{suffix}-{scale}.md'))}", soft_wrap=True, markup=False)
