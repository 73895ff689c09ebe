"""`list`, `data check` and `figure`: commands that show what there is."""

import json
from pathlib import Path
from typing import Annotated

import typer

from undistill.cli.options import Code, DataDir, OwnDefence, say
from undistill.core.errors import legible


def list_(
    kind: Annotated[
        str | None, typer.Argument(help="data, models, defences, attacks, launchers or suites; all by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List data, models, defences, attacks and suites, with fields and defaults."""
    from undistill.cli.catalogue import catalogue

    entries = catalogue(kind)
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    from rich.console import Console
    from rich.padding import Padding

    console = Console(highlight=False)
    for name, rows in entries.items():
        console.print(f"[bold]{name}[/]")
        for row in rows:
            console.print(Padding(row["spec"], (0, 0, 0, 2)), markup=False)
            console.print(Padding(row["about"], (0, 0, 0, 6)), style="dim", markup=False)


def data_check(
    name: Annotated[str, typer.Argument(help="A listed data set, a folder, an .npz file, or a spec.")],
    out: Annotated[Path | None, typer.Option(help="Where the sheet of samples goes: a PNG, or a folder.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Read a data set whole: files, counts, classes; and show a sheet of samples. Exit code 1 for other bytes."""
    from rich.console import Console

    from undistill.data.check import check
    from undistill.data.sheet import COLUMNS, write_sheet
    from undistill.data.source import Source

    source = Source.from_user(name)
    found = check(source)
    console = Console(highlight=False, markup=False)
    channels, height, width = found.data.shape
    console.print(f"{legible(source.title)}: {found.data.num_classes} classes, images {channels} x {height} x {width}")
    for file, state in found.files.items():
        console.print(f"  {file}: {state}", soft_wrap=True)
    for part, counts in found.counts.items():
        console.print(f"  {part}: {int(counts.sum()):,} images, {int(counts.min()):,} to {int(counts.max()):,} a class")
    sheet = f"{source.title}-samples.png"
    out = _place(out or Path("runs") / sheet, sheet)
    write_sheet(out, found.sheet())
    console.print(f"  up to {COLUMNS} images of each of the first classes: {legible(str(out))}", soft_wrap=True)
    if not found.as_published:
        console.print("These are not the published files, or they were packed anew. Trainings take them all the same.")
        raise typer.Exit(1)


def figure(
    name: Annotated[
        str, typer.Argument(help="answers, maps, students, curve, pareto, synthesised, training or ablation.")
    ],
    sources: Annotated[
        list[Path] | None, typer.Argument(help="An audit, a comparison, runs, or a table of 'reproduce'.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where it goes, both .svg and .png: a name, or a folder.")] = None,
    model: Code = None,
    defence: OwnDefence = None,
    data_dir: DataDir = None,
) -> None:
    """Draw one figure as SVG and PNG.

    answers, maps: of an audit, of a protected model's run, or of two runs, the unprotected one first

    students: of an audit

    curve: of an audit that was made with --curve

    pareto: price against leak and damage, of a comparison

    synthesised: of an audit, or the JSON of a table with attacks that have no data

    training: of runs

    ablation: of the JSON of a table
    """
    from undistill.defences.defence import Defence
    from undistill.report.drawing import draw_named
    from undistill.report.figures import save

    for one in defence or ():
        Defence.from_user(one)
    sources = sources or []
    drawn = draw_named(name, sources, model)
    beside_it = sources[0] / name if sources[0].is_dir() else sources[0].with_suffix("")
    for file in save(drawn, _place(out, beside_it.name) if out else beside_it):
        say(str(file))


def _place(out: Path, name: str) -> Path:
    """`out`, or `name` in it where that is a folder; made ready to be written to."""
    path = out / name if out.is_dir() else out
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
