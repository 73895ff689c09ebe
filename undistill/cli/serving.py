"""`serve`: a model behind HTTP, and `serve keys`: who may ask it."""

import time
from pathlib import Path
from typing import Annotated

import typer

from undistill.cli.options import Code, DataDir, Device, say
from undistill.core.errors import SpecError

LONGEST = 36_500  # days
MIB = 2**20

Place = Annotated[Path, typer.Argument(help="The run, the exported folder, or the --state of a gateway.")]
Name = Annotated[str, typer.Argument(help="Who gets the key.")]


def serve(
    what: Annotated[Path | None, typer.Argument(help="A run folder, or an exported one.")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="A model that stays where it is: Http('...'), Onnx('...'), ...")
    ] = None,
    defence: Annotated[
        list[str] | None,
        typer.Option(help="A response before --upstream; else a defence of your own again. Repeatable."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Images on which --upstream works, to calibrate by.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8080,
    state: Annotated[Path | None, typer.Option(help="Folder of keys and counts.", show_default="RUN-serve")] = None,
    audit: Annotated[
        Path | None, typer.Option(help="Of the run, or of the gateway: its curve says when an event is due.")
    ] = None,
    total_budget: Annotated[int | None, typer.Option(min=1, help="Images that all keys together may ask.")] = None,
    webhook: Annotated[str | None, typer.Option(help="Address to which events are posted.")] = None,
    without_keys: Annotated[bool, typer.Option("--without-keys", help="Listen on --host without any key.")] = False,
    name: Annotated[str, typer.Option(help="Name of the model in addresses.")] = "model",
    images: Annotated[int, typer.Option(min=1, max=65_536, help="Most images of a request, and of a batch.")] = 64,
    body: Annotated[
        int | None,
        typer.Option(min=1, max=4096, metavar="MIB", help="Largest body.", show_default="what --images take"),
    ] = None,
    pixels: Annotated[int, typer.Option(min=16, help="Of all pictures of a request.")] = 25_000_000,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds in which a body must arrive, and be answered.")
    ] = 30.0,
    under_way: Annotated[int, typer.Option(min=1, help="Images under way, in all requests together.")] = 1024,
    requests: Annotated[int, typer.Option(min=1, help="Requests that may be under way.")] = 128,
    model: Code = None,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Answer over HTTP with a protected model; 'undistill serve keys' says who may ask."""
    from undistill.serving.limits import Limits
    from undistill.serving.server import require_installed, write_log
    from undistill.serving.server import serve as work

    require_installed()
    write_log()
    work(
        what,
        upstream=upstream,
        defences=defence or (),
        data=data,
        state=state,
        audit=audit,
        model=model,
        host=host,
        port=port,
        name=name,
        limits=Limits(
            images=images,
            body=None if body is None else body * MIB,
            held=max(512, 4 * (body or 0)) * MIB,
            pixels=pixels,
            seconds=timeout,
            under_way=under_way,
            requests=requests,
        ),
        total_budget=total_budget,
        webhook=webhook,
        without_keys=without_keys,
        device=device,
    )


keys = typer.Typer(no_args_is_help=True, help="Who may ask a served model, and how much.")


@keys.command()
def add(
    what: Place,
    name: Name,
    budget: Annotated[
        str | None, typer.Option(help="The most images; 'none' is without end.", show_default="by the audit's curve")
    ] = None,
    audit: Annotated[Path | None, typer.Option(help="An audit of the model, whose curve sizes the budget.")] = None,
    days: Annotated[float | None, typer.Option(min=0.001, max=LONGEST, help="After which it expires.")] = None,
) -> None:
    """Make a key. It is shown once; only its hash is kept."""
    from undistill.serving.keys import keys_of

    kept, most = keys_of(what), _budget(what, budget, audit)
    token = kept.add(name, most, days)
    many = "any number of images" if most is None else f"{most:,} images"
    say(f"{name} may ask about {many}. The key, which is not shown again:")
    say(token)


@keys.command("list")
def list_(what: Place) -> None:
    """Show all keys, and how many images each asked about."""
    from undistill.serving.keys import keys_of

    accounts = keys_of(what).accounts(everybody=True)
    if not accounts:
        say("There are no keys. A server answers programs of this machine alone.")
        return
    say(f"{'name':<20} {'state':<8} {'budget':>11} {'billed':>11} {'distinct':>11}  ends")
    for one in accounts:
        budget = "none" if one.budget is None else f"{one.budget:,}"
        ends = "" if one.ends is None else time.strftime("%Y-%m-%d", time.gmtime(one.ends))
        say(f"{one.name:<20} {one.state:<8} {budget:>11} {one.billed:>11,} {one.distinct:>11,}  {ends}".rstrip())


@keys.command()
def revoke(what: Place, name: Name) -> None:
    """End a key at once, for a server that is running, too."""
    from undistill.serving.keys import keys_of

    keys_of(what).revoke(name)
    say(f"The key of {name} is revoked.")


def _budget(what: Path, text: str | None, audit: Path | None) -> int | None:
    """The budget that was named, or the most queries that bought no good copy in the audit of the model."""
    if text == "none":
        return None
    if text is not None:
        if not text.isdecimal() or int(text) >= 2**62:
            raise SpecError(f"'{text}' is no budget; it is a whole number of images, or none.")
        return int(text)
    from undistill.auditing.curve import GAPS
    from undistill.serving.served import findings_for

    found = findings_for(what, audit)
    if found is None or found.harmless is None:
        raise SpecError("Name a --budget, or an --audit of this model that measured a curve (undistill audit --curve).")
    if found.harmless == 0:
        raise SpecError(
            f"In the audit even the fewest queries bought a copy within {100 * GAPS[0]:g} points of the model; no "
            "budget keeps thieves off it. Name the --budget that you want."
        )
    return found.harmless
