"""`undistill demo`: the whole story on handwritten digits, every part of it anew for every seed."""

from pathlib import Path

from undistill import distributed
from undistill.auditor import perform, plan
from undistill.data import Digits
from undistill.launch import Serial
from undistill.progress import Progress
from undistill.recipe import Recipe
from undistill.report.schema import Report
from undistill.store import claim
from undistill.subject import Asking, Subject
from undistill.workflow import Settings, TrainSettings, pick_device, protect, train

MODEL = "ConvNet(width=16)"
STUDENT = "ConvNet(width=2)"
DEFENCE = "Nasty(omega=0.03, T=4)"
STUDENT_EPOCHS = 60


def demo(out: Path, seeds: int, progress: Progress, device: str = "auto") -> Report:
    """Train, protect and audit on `seeds` different splits of the digits; one report over all of them."""
    request = {"command": "demo", "model": MODEL, "defence": DEFENCE, "recipe": Recipe().model_dump(mode="json")}
    distributed.require_one("demo")
    pick_device(device)
    with claim(out, request):
        subjects = [subject(out / f"seed-{seed}", seed, progress, device) for seed in range(seeds)]
        jobs = list(plan(subjects, "quick", (), [STUDENT], Recipe(epochs=STUDENT_EPOCHS)))
        return perform(jobs, out, "quick", Serial(), progress)


def subject(folder: Path, seed: int, progress: Progress, device: str) -> Subject:
    """One honest teacher and its nasty twin, attacked with one seed."""
    honest_settings, settings = TrainSettings(seed=seed), Settings(seed=seed)
    data = Digits(seed=seed)
    honest = train(data, MODEL, folder / "honest", settings=honest_settings, device=device, progress=progress)
    victim = protect(honest, DEFENCE, folder / "nasty", settings=settings, device=device, progress=progress)
    return Subject(victim, honest, (seed,), asking=Asking(pick_device(device)))
