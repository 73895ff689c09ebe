"""The command line. Heavy imports wait until a command runs, so that --help answers at once."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undistill import __version__
from undistill.auditing.suites import MOST_SEEDS
from undistill.cli.options import (
    Address,
    AuditOut,
    Code,
    Commands,
    Config,
    DataDir,
    Device,
    Fast,
    OwnDefence,
    ProtectOut,
    Remember,
    Set,
    TrainOut,
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

log = logging.getLogger(__name__)

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    help="Protect a classifier against distillation, audit it, and show the evidence.",
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"undistill {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Protect a classifier against distillation, audit it, and show the evidence."""


@app.command()
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


@app.command()
def train(
    data: Annotated[str, typer.Option(help="digits, a folder of images by class, an .npz file, or a spec.")],
    model: Annotated[str, typer.Option(help="A listed network, or your own: path/to/file.py:factory.")],
    out: TrainOut = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start from these (safetensors or state dict); --set recipe.epochs=0 takes them as they are."
        ),
    ] = None,
    config: Config = None,
    settings: Set = None,
    fast: Fast = False,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Train a classifier normally: the honest teacher."""
    from undistill.cli.config import read_settings
    from undistill.runs.settings import TrainSettings
    from undistill.runs.train import train as run

    chosen = TrainSettings(**read_settings(config, settings, fast))
    out = out or Path("runs") / f"{Path(data.split('(')[0]).stem}-{Path(model.split('(')[0]).stem}"
    with working() as progress:
        result = run(data, model, out, weights=weights, settings=chosen, device=device, progress=progress)
    say(f"{result.folder}: validation accuracy {result.record['metrics']['validation_accuracy']:.1%}")


@app.command()
def adopt(
    data: Annotated[str, typer.Option(help="Images of the kind that it was trained on.")],
    model: Annotated[str, typer.Option(help="A listed network, or your own: path/to/file.py:factory.")],
    weights: Annotated[
        Path | None, typer.Argument(help="A checkpoint or safetensors file; none if the factory loads it.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Images that it has not seen, on which it is measured.")] = None,
    preprocess: Annotated[
        str, typer.Option(help="How it wants images: none, imagenet, half, cifar10, mnist, 255 or timm.")
    ] = "none",
    mean: Annotated[str | None, typer.Option(help="Or the mean of each channel, such as 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="With the standard deviation of each.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names in the order of its outputs: cat,dog,eel; by name otherwise.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Where the checkpoint keeps them, if it holds several.")] = None,
    out: TrainOut = None,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Take a trained classifier as it is, to protect and audit it."""
    from undistill.core.errors import SpecError
    from undistill.models.adapter import Adapter
    from undistill.runs.adopt import adopt as run

    def numbers(text: str | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in text.split(",")) if text else ()
        except ValueError:
            raise SpecError(f"'{text}' is no list of numbers, such as 0.485,0.456,0.406.") from None

    how = Adapter(mean=numbers(mean), std=numbers(std)) if mean or std else preprocess
    named = [name.strip() for name in classes.split(",")] if classes else ()
    out = out or Path("runs") / f"{Path(data.split('(')[0]).stem}-{Path(model.split('(')[0]).stem}"
    with working():
        result = run(
            model, data, out, weights=weights, key=key, preprocess=how, classes=named, test=test, device=device
        )
    metrics = result.record["metrics"]
    kept = "that it has not seen" if test else "of which it may have seen any"
    say(
        f"{result.folder}: accuracy {metrics['train_accuracy']:.1%} on training images, "
        f"{metrics['test_accuracy']:.1%} on test images, {kept}"
    )


@app.command()
def protect(
    run: Annotated[Path, typer.Argument(help="The run folder of the honest teacher.")],
    defence: Annotated[
        list[str], typer.Option(help='A listed defence, such as "Nasty(omega=0.04, T=4)"; several apply in this order.')
    ],
    out: ProtectOut = None,
    model: Code = None,
    config: Config = None,
    settings: Set = None,
    fast: Fast = False,
    device: Device = "auto",
    data_dir: DataDir = None,
    remember: Remember = 4.0,
) -> None:
    """Make a protected twin of a trained classifier."""
    from undistill.cli.config import merge, read_settings
    from undistill.runs.protect import protect as work
    from undistill.runs.run import Run
    from undistill.runs.settings import Settings, recorded_settings

    honest = Run.open(run)
    chosen = Settings(**merge(recorded_settings(honest).model_dump(), read_settings(config, settings, fast)))
    out = out or beside(run, "-".join(one.split("(")[0].split(":")[-1].lower() for one in defence))
    with working() as progress:
        victim = work(
            honest, defence, out, model=model, settings=chosen, device=device, remember=remember, progress=progress
        )
    metrics = victim.record["metrics"]
    say(
        f"{victim.folder}: validation accuracy {metrics['validation_accuracy']:.1%} "
        f"(honest {honest.record['metrics']['validation_accuracy']:.1%}), "
        f"divergence T^2 KL {metrics['divergence']:.2f} nats"
    )


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="The run folder of the protected model.")],
    honest: Annotated[
        Path | None, typer.Option(help="Its unprotected twin; by default the run it was protected from.")
    ] = None,
    suite: Annotated[str, typer.Option(help="A listed suite of attacks.")] = "quick",
    attack: Annotated[
        list[str] | None, typer.Option(help="One more attack, listed or file.py:Name(...); repeatable.")
    ] = None,
    student: Annotated[
        list[str] | None, typer.Option(help="The thief's network instead of the suite's; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=MOST_SEEDS, help="Students of each kind.")] = 3,
    budget: Annotated[int | None, typer.Option(min=1, help="The most queries of each thief.")] = None,
    out: AuditOut = None,
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
    from undistill.cli.config import merge, read_settings
    from undistill.runs.run import Run, parent
    from undistill.runs.settings import AuditSettings, recorded_settings

    victim = Run.open(run)
    recipe = recorded_settings(Run.open(honest or parent(victim))).recipe
    chosen = AuditSettings(**merge({"recipe": recipe.model_dump()}, read_settings(config, settings, fast)))
    out = out or beside(run, "audit")
    with working() as progress:
        report = work(
            victim,
            out,
            honest=honest,
            suite=suite,
            attacks=attack or (),
            students=student or (),
            seeds=seeds,
            recipe=chosen.recipe,
            model=model,
            defences=defence or (),
            budget=budget,
            device=device,
            launcher=build_launcher(launcher, workers, address),
            remember=remember,
            progress=progress,
        )
    show(report, out)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Where an audit or demo wrote its report.")],
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Make the pages of an audit again from report.json, and show the table."""
    import webbrowser

    from undistill.report.page import read_report, render

    render(folder)
    show(read_report(folder), folder)
    if open_:
        webbrowser.open((folder / "report.html").resolve().as_uri())


@app.command("list")
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


data = typer.Typer(no_args_is_help=True, help="Look at a data set.")
app.add_typer(data, name="data")


@data.command("check")
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


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="answers, maps, students, synthesised, training or ablation.")],
    sources: Annotated[list[Path] | None, typer.Argument(help="An audit, runs, or a table of 'reproduce'.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where it goes, both .svg and .png: a name, or a folder.")] = None,
    model: Code = None,
    defence: OwnDefence = None,
    data_dir: DataDir = None,
) -> None:
    """Draw one figure as SVG and PNG.

    answers, maps: of an audit, of a protected model's run, or of two runs, the unprotected one first

    students: of an audit

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


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="An experiment, or 'list'.")] = "list",
    scale: Annotated[str, typer.Option(help="smoke (digits), small (two cores) or paper (as published).")] = "small",
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
        rows = experiments.reproduce(name, scale, range(seeds), cells, runner, select_on_test=select_on_test)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, header in enumerate(experiments.HEADER):
        table.add_column(header, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    console.print(f"\n{experiments.caveat(rows)}")
    suffix = "-selected-on-test" if select_on_test else ""
    console.print(f"\nTable: {legible(str(out / f'{name}{suffix}-{scale}.md'))}", soft_wrap=True, markup=False)


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
        rows.add_row(f"({side} model itself)", percent(teacher.accuracy), "", "")
    for row in table(report):
        rows.add_row(escape(legible(row["attack"])), row["accuracy"], row["fidelity"], row["queries"])
    console.print(rows)
    verdict = report.verdict
    sentence = escape(legible(verdict.sentence))
    console.print(
        f"\n{sentence}\n\nIn points: damage {points(verdict.damage)}, cost {points(verdict.cost)}, "
        f"leak beyond the label {points(verdict.leak_hard)}, gain of a student of the unprotected model "
        f"{points(verdict.kd_gain_honest)}."
    )
    for flag in report.flags:
        console.print(f"Read with care: {legible(flag.message)}", style="yellow", markup=False)
    console.print(f"\nReport: {legible(str(folder / 'report.html'))}", soft_wrap=True, markup=False)
