"""Thieves tune their attacks: settings are tried on validation images, and the best one is measured."""

import dataclasses
import importlib.util
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from undistill.auditing.cell import Job, TrialJob
from undistill.auditing.launchers import Launcher
from undistill.auditing.schema import Trial
from undistill.auditing.statistics import preferred
from undistill.auditing.suites import Tuning
from undistill.core.identity import fingerprint
from undistill.core.progress import Progress

Setting = Mapping[str, Any]
"""Values of fields of an attack; `recipe.lr` and `recipe.clip` are factors of the recipe's."""

COMMON: Setting = {"recipe.lr": (1.0, 0.3, 3.0), "recipe.clip": (1.0, 0.2)}
"""Tried by every thief."""
SEED = 1_000_000
"""Seed of all trials. Students that are measured have others: the luck of a seed that won is not counted as skill."""
ATTEMPTS = 20  # to be proposed a setting that was not tried yet, of which there may be none
UNINFORMED = 4
"""Trials before Optuna is asked what to do next; they wait for no score, and are done side by side."""


def tune(
    jobs: Sequence[Job], tuning: Tuning, launcher: Launcher, cells: Path, progress: Progress
) -> tuple[list[Trial], list[Job]]:
    """All trials of some attacks, and the jobs with the setting that each thief prefers."""
    searches = [Search.of(job, tuning) for job in jobs]
    while asked := [(search, trial) for search in searches for trial in search.ask()]:
        results = launcher.run([trial for _, trial in asked], cells, progress)
        for (search, _), result in zip(asked, results, strict=True):
            search.tell(cast(Trial, result))
    return [trial for search in searches for trial in search.trials], [search.best for search in searches]


class Grid:
    """Settings drawn from all combinations, the same ones for the same seed."""

    uninformed = sys.maxsize
    name = "drawn from the grid"

    def __init__(self, space: Mapping[str, Sequence[Any]], seed: int) -> None:
        self.space, self.random = space, random.Random(seed)

    def next(self) -> Setting:
        return {name: self.random.choice(values) for name, values in self.space.items()}

    def tell(self, setting: Setting, score: float) -> None:
        """Nothing is learnt from scores."""


class Optuna:
    """Settings that Optuna proposes by what it was told of others (TPE), the same ones for the same scores."""

    uninformed = UNINFORMED

    def __init__(self, space: Mapping[str, Sequence[Any]], seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name = f"proposed by Optuna {optuna.__version__}"
        self.space = space
        # by position, since Optuna takes only simple values
        self.ranges: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(range(len(values))) for name, values in space.items()
        }
        sampler = optuna.samplers.TPESampler(n_startup_trials=UNINFORMED, seed=seed)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)

    def next(self) -> Setting:
        places = self.study.ask(self.ranges).params
        return {name: self.space[name][place] for name, place in places.items()}

    def tell(self, setting: Setting, score: float) -> None:
        import optuna

        if all(value in self.space[name] for name, value in setting.items()):  # the listed setting may have others
            places = {name: self.space[name].index(value) for name, value in setting.items()}
            known = optuna.trial.create_trial(params=places, distributions=self.ranges, value=score)
            self.study.add_trial(known)


def proposals(space: Mapping[str, Sequence[Any]], seed: int) -> Grid | Optuna:
    """The search over settings: Optuna's where it is installed, else the grid."""
    return Optuna(space, seed) if importlib.util.find_spec("optuna") else Grid(space, seed)


@dataclass(eq=False)
class Search:
    """The search of one thief."""

    job: Job
    tuning: Tuning
    proposals: Grid | Optuna
    asked: list[Job] = field(default_factory=list)
    """The job with each setting that was tried."""
    settings: list[Setting] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    exhausted: bool = False
    """Whether nothing new was proposed; then it has ended, whatever other searches do."""

    @classmethod
    def of(cls, job: Job, tuning: Tuning) -> "Search":
        # not of the side: a victim and its twin are tried with the same settings, as long as these wait for no score
        seed = int(fingerprint(str(job.attack), str(job.student))[:8], 16)
        return cls(job, tuning, proposals({**job.attack.space, **COMMON}, seed))

    def ask(self) -> list[TrialJob]:
        """The next trials, the listed setting first: one, or as many as wait for no score; none at the end."""
        left = 0 if self.exhausted else self.tuning.trials - len(self.asked)
        asked: list[TrialJob] = []
        for _ in range(min(left, max(self.proposals.uninformed - len(self.asked), 1))):
            setting = self._new() if self.asked else self._listed
            if setting is None:
                self.exhausted = True
                break
            job = configured(self.job, setting) if self.asked else self.job
            self.settings.append(setting)
            self.asked.append(job)
            asked.append(trial_of(job, self.tuning.share))
        return asked

    @property
    def _listed(self) -> Setting:
        return {name: getattr(self.job.attack, name) for name in self.job.attack.space} | dict.fromkeys(COMMON, 1.0)

    def _new(self) -> Setting | None:
        """A setting that was not tried yet; None where there is none, or none is proposed."""
        for _ in range(ATTEMPTS):
            setting = self.proposals.next()
            job = configured(self.job, setting)
            known = [number for number, old in enumerate(self.asked) if same_setting(job, old)]
            if not known:
                return setting
            if known[0] < len(self.trials):
                self.proposals.tell(setting, self.trials[known[0]].score)
        return None

    def tell(self, trial: Trial) -> None:
        self.proposals.tell(self.settings[len(self.trials)], trial.score)
        self.trials.append(trial)

    @property
    def best(self) -> Job:
        """The job with the setting whose trial had the highest score, or the listed one if that is as good."""
        return self.asked[preferred([trial.score for trial in self.trials], self.trials[0].images)]


def configured(job: Job, setting: Setting) -> Job:
    """The job with another setting of its attack; it remembers how the attack was listed."""
    own = {name: value for name, value in setting.items() if not name.startswith("recipe.")}
    factors = {name.removeprefix("recipe."): value for name, value in setting.items() if name.startswith("recipe.")}
    recipe = job.recipe.model_copy(update={name: getattr(job.recipe, name) * by for name, by in factors.items()})
    attack = type(job.attack)(**(job.attack.model_dump() | own))
    return replace(job, attack=attack, recipe=recipe, listed=job.listed or str(job.attack))


def same_setting(one: Job, other: Job) -> bool:
    return (str(one.attack), str(one.recipe)) == (str(other.attack), str(other.recipe))


def trial_of(job: Job, share: float) -> TrialJob:
    """The job for a share of its epochs, judged by validation images."""
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    return TrialJob(**(fields | {"seed": SEED, "epochs_share": share}))
