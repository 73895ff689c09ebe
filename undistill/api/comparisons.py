"""`compare`: several defences of one network, audited by one suite."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from undistill.api.audits import alone_in, judged, plan_audit, request_of
from undistill.attacks.attack import Attack
from undistill.auditing.comparison import NONE, Comparison, compared, folder_name, parse_defences, row_name, row_of
from undistill.auditing.forecast import count as quantity
from undistill.auditing.forecast import describe, forecast
from undistill.auditing.launchers import Launcher
from undistill.core.errors import UndistillError
from undistill.core.progress import Progress
from undistill.data.arrays import Images, stored
from undistill.data.source import Source
from undistill.defences.defence import Defence
from undistill.models.model import Model
from undistill.runs.folder import claim
from undistill.runs.protect import protect, require_order
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.training.answers import REMEMBER
from undistill.training.recipe import Recipe


class CompareOptions(TypedDict, total=False):
    """Options that `compare` hands on to every audit, each as in `audit`."""

    attacks: Sequence[str | Attack]
    students: Sequence[str | Model]
    seeds: int
    trials: int | None
    share: float | None
    curve: bool
    recipe: Recipe | None
    model: str | Model | nn.Module | Callable[..., nn.Module] | None
    budget: int | None
    device: str
    remember: float


def compare(
    run: str | Path | Run,
    defences: Sequence[str],
    out: str | Path,
    *,
    suite: str = "standard-1",
    settings: Settings | None = None,
    pool: Images | None = None,
    by: str = "",
    launcher: str | Launcher = "Serial",
    progress: Progress | bool | None = None,
    **options: Unpack[CompareOptions],
) -> Comparison:
    """Protect one network by several defences, and audit each by one suite, beside the unprotected network itself.

    Writes comparison.json, comparison.html and comparison.md into `out`; victims and their audits lie below it, and
    share the students that they have in common.

    Args:
        run: the run folder of the unprotected network.
        defences: a row each: one defence, or several that apply in this order as 'A(...) + B(...)'.
        out: where the result goes. What it holds already is not done again.
        suite: a listed suite of attacks and students.
        settings: recipe and seed of the protected networks, by default those of the honest one.
        pool: images of thieves who have none of the owner's, as for `train`.
        by: whoever audits, for the page.
        launcher: where cells are done: `Serial`, `Pool(workers=2)`, `Ray(address='auto')`.
        progress: True shows it on standard error, False nowhere; None shows it in a notebook.
        options: the rest of what `audit` takes. Attacks that cannot be tried on a victim are left out of its row.
    """
    from undistill.report.comparison import write_comparison

    honest, out = run if isinstance(run, Run) else Run.open(run), Path(out)
    launcher, asked = Launcher.from_user(launcher), rows_of(honest, defences, options.get("model"))
    surrogates = None if pool is None else stored(pool, out)
    plan_for = partial(plan_audit, honest=honest, suite=suite, pool=surrogates, strict=False, **options)
    plan_for(honest)  # what cannot be audited at all is said before anything is trained
    reports, rows = [], []
    with claim(out, {"command": "compare", "honest": honest.digest}), alone_in(out / "cells"), launcher.ready():
        with Progress.of(progress) as shown:
            victims = {
                text: _protected(honest, row, out / "victims" / folder_name(text), settings, shown, options)
                for text, row in asked.items()
            }
            for text, victim in victims.items():  # one at a time, for each holds its data and two networks
                plan = plan_for(victim)
                plan.jobs[0].pair.require_finite()
                folder = out / "audits" / folder_name(text)
                with claim(folder, request_of(plan)):
                    shown.say(f"{text}: {describe(plan, out / 'cells')}")
                    report, judge = judged(plan, folder, launcher, shown, by, out / "cells")
                reports.append(report)
                rows.append(row_of(report, judge, text))
        comparison = compared(reports, rows)
        write_comparison(comparison, out)
    return comparison


def rows_of(honest: Run, defences: Sequence[str], model: Any) -> dict[str, list[Defence]]:
    """The defences of each row, by its name, after one without any. What cannot be done is said before any is done."""
    rows: dict[str, list[Defence]] = {NONE: []}
    for text in defences:
        row = [Defence.from_user(one) for one in parse_defences(text)]
        require_order(row)
        rows[row_name(row)] = row
    network, data = honest.network(honest.model(None if model is None else Model.from_user(model))), honest.data()
    for defence in dict.fromkeys(one for row in rows.values() for one in row):
        defence.check(network, data.split)
    return rows


def _protected(
    honest: Run, row: list[Defence], out: Path, settings: Settings | None, shown: Progress, options: CompareOptions
) -> Run:
    """The victim of one row, made or found."""
    if not row:
        return honest
    shown.say(f"Protecting by {row_name(row)}.")
    try:
        return protect(
            honest,
            row,
            out,
            settings=settings,
            model=options.get("model"),
            device=options.get("device", "auto"),
            remember=options.get("remember", REMEMBER),
            progress=shown,
        )
    except UndistillError as error:
        raise type(error)(f"{row_name(row)}: {error}") from None


def describe_comparison(
    run: Run,
    defences: Sequence[str],
    out: str | Path,
    *,
    suite: str = "standard-1",
    pool: str | Source | None = None,
    **options: Unpack[CompareOptions],
) -> str:
    """Say what `compare` would do, and about how long the students of the unprotected network take."""
    rows = rows_of(run, defences, options.get("model"))
    plan = plan_audit(run, honest=run, suite=suite, pool=pool, strict=False, **options)
    seconds = forecast(plan, Path(out) / "cells")
    return (
        f"{quantity(len(rows) - 1, 'defence')} to train and calibrate; an audit of each, and of the unprotected "
        f"network. {describe(plan, Path(out) / 'cells')} For the unprotected network: {seconds} Each defence takes "
        "about as long, but for the students without teacher, who are trained once."
    )
