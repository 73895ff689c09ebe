"""`undistill demo`: the whole story on handwritten digits, every part of it anew for every seed."""

from pathlib import Path

from undistill.api.audits import perform
from undistill.auditing.launchers import Serial
from undistill.auditing.pair import QueryOptions, VictimPair
from undistill.auditing.plan import Plan
from undistill.auditing.schema import Report
from undistill.core import distributed
from undistill.core.progress import Progress
from undistill.data.digits import Digits
from undistill.runs.folder import claim
from undistill.runs.protect import protect
from undistill.runs.settings import Settings, TrainSettings
from undistill.runs.train import train
from undistill.training.compute import pick_device
from undistill.training.recipe import Recipe

MODEL = "ConvNet(width=16)"
STUDENT = "ConvNet(width=2)"
DEFENCE = "Nasty(omega=0.03, T=4)"
STUDENT_EPOCHS = 60
TOGETHER = 10  # students of one pair, all in the same steps: a quarter faster on two cores
REQUEST = {"command": "demo", "model": MODEL, "defences": [DEFENCE], "recipe": Recipe().model_dump(mode="json")}


def demo(out: Path, seeds: int, progress: Progress, device: str = "auto") -> Report:
    """Train, protect and audit on `seeds` different splits of the digits; one report over all of them."""
    distributed.require_one("demo")
    pick_device(device)
    with claim(out, REQUEST):
        pairs = [pair(out / f"seed-{seed}", seed, progress, device) for seed in range(seeds)]
        plan = Plan.of(pairs, "quick-2", (), [STUDENT], Recipe(epochs=STUDENT_EPOCHS))
        return perform(plan, out, Serial(stacked=TOGETHER), progress)


def pair(folder: Path, seed: int, progress: Progress, device: str) -> VictimPair:
    """One honest teacher and its nasty twin, attacked with one seed."""
    honest_settings, settings = TrainSettings(seed=seed), Settings(seed=seed)
    data = Digits(seed=seed)
    honest = train(data, MODEL, folder / "honest", settings=honest_settings, device=device, progress=progress)
    victim = protect(honest, DEFENCE, folder / "nasty", settings=settings, device=device, progress=progress)
    return VictimPair(victim, honest, (seed,), options=QueryOptions(pick_device(device)))
