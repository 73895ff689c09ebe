"""`undistill demo`: the whole story on handwritten digits, every part of it anew for every seed."""

from pathlib import Path

from undistill.auditor import Subject, perform, plan
from undistill.data import Digits
from undistill.fit import Recipe
from undistill.progress import Progress
from undistill.report.schema import Report
from undistill.store import claim
from undistill.workflow import Settings, TrainSettings, protect, train

MODEL = "ConvNet(width=16)"
STUDENT = "ConvNet(width=2)"
DEFENCE = "Nasty(omega=0.025, T=4)"
STUDENT_EPOCHS = 60


def demo(out: Path, seeds: int, progress: Progress, device: str = "auto") -> Report:
    """Train, protect and audit on `seeds` different splits of the digits; one report over all of them."""
    claim(out, {"command": "demo", "model": MODEL, "defence": DEFENCE, "recipe": Recipe().model_dump(mode="json")})
    subjects = []
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        settings = TrainSettings(seed=seed)
        honest = train(Digits(seed=seed), MODEL, folder / "honest", settings=settings, device=device, progress=progress)
        victim = protect(
            honest, DEFENCE, folder / "nasty", settings=Settings(seed=seed), device=device, progress=progress
        )
        subjects.append(Subject(victim, honest, (seed,)))
    jobs = list(plan(subjects, "quick", (), [STUDENT], Recipe(epochs=STUDENT_EPOCHS)))
    return perform(jobs, out, "quick", device, progress)
