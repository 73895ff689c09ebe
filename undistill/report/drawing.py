"""`undistill figure`: one picture, from an audit, from runs or from a reproduced table."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from undistill.errors import SpecError, StoreError, unknown
from undistill.report import figures
from undistill.report.curves import ablation, of_runs, training
from undistill.report.evidence import Evidence, read_evidence
from undistill.report.page import read_report
from undistill.store import Run


def draw(name: str, sources: Sequence[Path]) -> Figure:
    """The figure `name` of `sources`: folders of audits or runs, or tables; `SpecError` for an unknown one."""
    if name not in FIGURES:
        raise SpecError(unknown("figure", name, FIGURES))
    if not sources:
        raise SpecError(f"A figure is drawn from something: undistill figure {name} {FIGURES[name][0]}")
    return FIGURES[name][1](sources)


def _of_evidence(make: Callable[[Evidence], Figure]) -> Callable[[Sequence[Path]], Figure]:
    return lambda sources: make(read_evidence(_one(sources) / "evidence.npz"))


def _one(sources: Sequence[Path]) -> Path:
    if len(sources) > 1:
        raise SpecError(f"This figure shows one audit; {len(sources)} were named.")
    return sources[0]


def _synthesised(evidence: Evidence) -> Figure:
    if not evidence.sheets:
        raise StoreError("No attack of this audit made images; add one that does, such as --attack 'DeepInversion()'.")
    return figures.sheets(evidence)


FIGURES: dict[str, tuple[str, Callable[[Sequence[Path]], Figure]]] = {
    "answers": ("AUDIT", _of_evidence(figures.answers)),
    "maps": ("AUDIT", _of_evidence(figures.maps)),
    "students": ("AUDIT", lambda sources: figures.students(read_report(_one(sources)))),
    "synthesised": ("AUDIT", _of_evidence(_synthesised)),
    "training": ("RUN...", lambda sources: training(of_runs([Run.open(source) for source in sources]))),
    "ablation": ("TABLE.json", lambda sources: ablation(_one(sources))),
}
