"""`undistill demo`: the whole story on handwritten digits, every part of it anew for every seed."""

from pathlib import Path

from undistill.auditor import Subject, audit_pairs
from undistill.data import Digits
from undistill.progress import Progress
from undistill.report.schema import Report
from undistill.store import claim
from undistill.workflow import Settings, TrainSettings, protect, train

MODEL = "ConvNet(width=32)"
DEFENCE = "Nasty(omega=0.04, T=4)"


def demo(out: Path, seeds: int, progress: Progress, device: str = "auto") -> Report:
    """Train, protect and audit on `seeds` different splits of the digits; one report over all of them."""
    claim(out, {"command": "demo", "model": MODEL, "defence": DEFENCE})
    subjects = []
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        settings = TrainSettings(seed=seed)
        honest = train(Digits(seed=seed), MODEL, folder / "honest", settings=settings, device=device, progress=progress)
        victim = protect(
            honest, DEFENCE, folder / "nasty", settings=Settings(seed=seed), device=device, progress=progress
        )
        subjects.append(Subject(victim, honest, (seed,)))
    return audit_pairs(subjects, out, suite="quick", device=device, progress=progress)
