"""`undistill figure`: one picture, from an audit, from runs or from a reproduced table."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from undistill.auditing.pair import VictimPair
from undistill.core.errors import SpecError, StoreError, unknown
from undistill.core.files import inside
from undistill.data.pictures import read_sheet
from undistill.models.model import Model
from undistill.report import figures
from undistill.report.comparison import pareto, read_comparison
from undistill.report.curves import ablation, of_runs, queries, training
from undistill.report.evidence import Array, Evidence, evidence_of, read_evidence
from undistill.report.page import read_report
from undistill.report.table import read_table
from undistill.runs.run import Run, parent

MOST_SHEETS = 50


def draw_named(name: str, sources: Sequence[Path], model: str | None = None) -> Figure:
    """The figure `name` of `sources`: folders of audits or runs, or tables; `SpecError` for an unknown one.

    `model` names the network of runs again where it is the user's own code.
    """
    if name not in FIGURES:
        raise SpecError(unknown("figure", name, FIGURES))
    if not sources:
        raise SpecError(f"A figure is drawn from something: undistill figure {name} {FIGURES[name][0]}")
    return FIGURES[name][1](sources, None if model is None else Model.from_user(model))


def _one(sources: Sequence[Path]) -> Path:
    if len(sources) > 1:
        raise SpecError(f"This figure shows one thing; {len(sources)} were named.")
    return sources[0]


def _evidence(sources: Sequence[Path], model: Model | None) -> Evidence:
    """Evidence of an audit, of a protected run and its twin, or of two runs, the unprotected one first."""
    if (sources[0] / "evidence.npz").exists():
        return read_evidence(_one(sources) / "evidence.npz")
    runs = [Run.open(source) for source in sources]
    if len(runs) > 2:
        raise SpecError(f"This figure compares two runs; {len(runs)} were named.")
    honest = runs[0] if len(runs) == 2 else Run.open(parent(runs[0]))
    VictimPair(runs[-1], honest, ())  # which refuses runs on different data
    return evidence_of(honest, runs[-1], model)


def _sheets(source: Path) -> Mapping[str, Array]:
    """Sheets of images by name, from an audit or a table."""
    if source.suffix != ".json":
        return read_evidence(source / "evidence.npz").sheets
    named = {row.name: [one.sheet for one in row.measured.values() if one.sheet] for row in read_table(source).rows}
    shown = [(name, sheets[0]) for name, sheets in named.items() if sheets][:MOST_SHEETS]
    return {name: read_sheet(inside(source.parent, sheet)) for name, sheet in shown}


def _synthesised(source: Path) -> Figure:
    sheets = _sheets(source)
    if not sheets:
        raise StoreError(f"No attack in {source} made images; add one that does, such as --attack 'DeepInversion()'.")
    return figures.sheets(sheets)


FIGURES: dict[str, tuple[str, Callable[[Sequence[Path], Model | None], Figure]]] = {
    "answers": ("AUDIT | RUN...", lambda sources, model: figures.answers(_evidence(sources, model))),
    "maps": ("AUDIT | RUN...", lambda sources, model: figures.maps(_evidence(sources, model))),
    "curve": ("AUDIT", lambda sources, _: queries(read_report(_one(sources)))),
    "students": ("AUDIT", lambda sources, _: figures.students(read_report(_one(sources)))),
    "synthesised": ("AUDIT | TABLE.json", lambda sources, _: _synthesised(_one(sources))),
    "pareto": ("COMPARISON", lambda sources, _: pareto(read_comparison(_one(sources)).rows)),
    "training": ("RUN...", lambda sources, _: training(of_runs([Run.open(source) for source in sources]))),
    "ablation": ("TABLE.json", lambda sources, _: ablation(_one(sources))),
}
