"""The commands. Heavy imports wait until one runs, so that --help answers at once."""

from typing import Annotated

import typer

from undistill import __version__
from undistill.cli.audits import audit, demo, report
from undistill.cli.comparing import compare
from undistill.cli.looking import data_check, figure, list_
from undistill.cli.models import adopt, protect, train
from undistill.cli.options import Commands, say
from undistill.cli.reproducing import reproduce
from undistill.cli.serving import keys, serve
from undistill.cli.shipping import export

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


app.command()(demo)
app.command()(train)
app.command()(adopt)
app.command()(protect)
app.command()(audit)
app.command()(compare)
app.command()(report)
app.command()(export)
app.command()(serve)
app.add_typer(keys, name="serve keys")
app.command("list")(list_)
app.command()(figure)
app.command()(reproduce)
data = typer.Typer(no_args_is_help=True, help="Look at a data set.")
data.command("check")(data_check)
app.add_typer(data, name="data")
