"""`export`: what leaves the house."""

from pathlib import Path
from typing import Annotated

import typer

from undistill.cli.options import Code, DataDir, OwnDefence, say


def export(
    run: Annotated[Path, typer.Argument(help="The run folder of the model.")],
    to: Annotated[Path, typer.Option(help="The new folder; the same export gets another --audit.")],
    format_: Annotated[
        str, typer.Option("--format", help="onnx, torch (which take the one or the other to run), or all.")
    ] = "all",
    audit: Annotated[Path | None, typer.Option(help="An audit of this run, whose verdict goes with the model.")] = None,
    model: Code = None,
    defence: OwnDefence = None,
    data_dir: DataDir = None,
) -> None:
    """Write a model with its protection into a folder that runs without undistill."""
    from undistill.ship.export import export as work
    from undistill.ship.manifest import read_manifest

    folder = work(run, to, format=format_, audit=audit, model=model, defences=defence or ())  # type: ignore[arg-type]
    manifest = read_manifest(folder)
    apart = f", but for {manifest.at_threshold} at a threshold" if manifest.at_threshold else ""
    say(
        f"{folder}: {', '.join(name for name in manifest.files if name.startswith(('model.', 'weights')))}. "
        f"They answer {manifest.compared:,} validation images as the run does, to {manifest.largest:.1g}{apart}."
    )
