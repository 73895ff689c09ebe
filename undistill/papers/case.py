"""Cases, each one value of a paper's table, and the runner that measures them. Teachers are trained once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from undistill.attacks.attack import Attack
from undistill.auditing.cell import Job
from undistill.auditing.launchers import Launcher
from undistill.auditing.pair import QueryOptions, VictimPair
from undistill.auditing.schema import Side
from undistill.core.errors import NonFinite
from undistill.core.identity import fingerprint, program_sha256, source_sha256
from undistill.core.progress import Progress
from undistill.core.spec import Spec
from undistill.data.source import Source
from undistill.defences.defence import Defence
from undistill.models.model import Model
from undistill.report.table import Measured
from undistill.runs import protect as protecting
from undistill.runs.environment import described, environment
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings, TrainSettings
from undistill.runs.train import train
from undistill.training import metrics
from undistill.training.answers import REMEMBER
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Access


@dataclass(frozen=True)
class Teacher:
    """An honest network, and how it is trained."""

    data: Source
    model: Model
    recipe: Recipe


@dataclass(frozen=True)
class Case:
    """One value: the test accuracy of a teacher, or of a student that attacked it."""

    name: str
    teacher: Teacher
    defence: Defence | None = None
    """None stands for the honest teacher."""
    adversary: Teacher | None = None
    """Network from which a nasty teacher is made to differ (the paper's word); None stands for its honest twin."""
    attack: Attack | None = None
    """None stands for the teacher itself."""
    student: Model | None = None
    recipe: Recipe = field(default_factory=Recipe)
    """How the student is trained."""
    share: float = 1.0
    """Share of the training images that the attacker holds."""
    published: float | None = None
    """Percent."""


@dataclass
class Runner:
    """A folder in which cases are measured; what it holds is not done again."""

    folder: Path
    launcher: Launcher
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = field(default_factory=Progress.silent)
    remember: float = REMEMBER
    """GiB of disk for the answers of each teacher."""
    diverged: dict[Path, str] = field(default_factory=dict, init=False)
    """Folders of teachers that ended without a network, and why; they are not trained again."""
    digests: dict[Source, str] = field(default_factory=dict, init=False)
    """SHA-256 of the data that was read already."""

    def code(self, case: Case, seed: int) -> str:
        """The value of `Measured.code` for a case that is measured here and now."""
        teachers = [teacher for teacher in (case.teacher, case.adversary) if teacher]
        used = [*(teacher.model for teacher in teachers), case.defence, case.attack, case.student]
        made_on = environment(self.device)
        sources = [*(source_sha256(type(spec)) for spec in used if spec), program_sha256(Path(__file__))]
        images = [self._digest(_source(teacher, seed)) for teacher in teachers]
        parts = [*sources, *images, made_on["torch"], made_on["device"]]
        return fingerprint(*parts)[:20]

    def _digest(self, source: Source) -> str:
        """Files may be replaced; what was made of the old ones is not of the new ones."""
        if source not in self.digests:
            self.digests[source] = source.load().digest
        return self.digests[source]

    def measure(self, cases: Sequence[Case], seed: int) -> Iterator[tuple[Case, Measured]]:
        """Every case, those of one teacher together. A training that diverges is a result."""
        for spec in dict.fromkeys(map(_pair_spec, cases)):
            together = [case for case in cases if _pair_spec(case) == spec]
            for case, measured in self._measure_pair(spec, together, seed):
                yield case, replace(measured, code=self.code(case, seed))

    def _measure_pair(self, spec: "PairSpec", cases: Sequence[Case], seed: int) -> Iterator[tuple[Case, Measured]]:
        try:
            pair = self.pair(*spec, seed)
        except NonFinite as error:
            lost = Measured(0.0, diverged=str(error), environment=described(environment(self.device)))
            yield from ((case, lost) for case in cases)
        else:
            yield from self._measure(pair, cases, seed)

    def _measure(self, pair: VictimPair, cases: Sequence[Case], seed: int) -> Iterator[tuple[Case, Measured]]:
        divergence = pair.victim.record["metrics"].get("divergence")
        for case in cases:
            if not case.attack:
                yield case, _of_teacher(pair)
        students = [case for case in cases if case.attack]
        jobs = [job(pair, case, seed) for case in students]
        cells = self.launcher.run(jobs, self.folder / "cells", self.progress) if jobs else []
        for case, one, cell in zip(students, jobs, cells, strict=True):
            sheet = one.sheet(self.folder / "cells")
            shown = sheet.relative_to(self.folder).as_posix() if sheet.exists() else ""
            made_on, why = cell.environment, cell.diverged
            yield case, Measured(100 * cell.accuracy, divergence, diverged=why, environment=made_on, sheet=shown)

    def pair(
        self, teacher: Teacher, defence: Defence | None, adversary: Teacher | None, share: float, seed: int
    ) -> VictimPair:
        """The victim beside its honest twin, which is its own twin where nothing defends it."""
        honest = self.honest(teacher, seed)
        victim = self.victim(honest, teacher, defence, adversary, seed) if defence else honest
        options = QueryOptions(self.device, teacher.recipe.compute, self.remember)
        return VictimPair(victim, honest, (seed,), options=options, share=share)

    def honest(self, teacher: Teacher, seed: int) -> Run:
        source = _source(teacher, seed)
        settings = TrainSettings(seed=seed, recipe=teacher.recipe)
        folder = self._folder(teacher.model, seed, str(source), self._digest(source), str(settings))
        with self._once(folder, f"the honest {teacher.model}"):
            return train(
                source, teacher.model, folder, settings=settings, device=str(self.device), progress=self.progress
            )

    def victim(self, honest: Run, teacher: Teacher, defence: Defence, adversary: Teacher | None, seed: int) -> Run:
        settings = Settings(seed=seed, recipe=teacher.recipe)
        other = self.honest(adversary, seed) if adversary else honest
        folder = self._folder(defence, seed, honest.digest, other.digest, str(settings))
        if (folder / "run.json").exists():  # wherever the other adversary lay when it was made
            return Run.open(folder)
        if adversary:
            defence = type(defence)(**(defence.model_dump() | {"adversary": str(other.folder.resolve())}))
        with self._once(folder, f"the protected {teacher.model}"):
            return protect(
                honest,
                defence,
                folder,
                settings=settings,
                device=str(self.device),
                remember=self.remember,
                progress=self.progress,
            )

    @contextmanager
    def _once(self, folder: Path, who: str) -> Iterator[None]:
        """A training that diverged is not begun again; `NonFinite` says whose it was."""
        if folder in self.diverged:
            raise NonFinite(self.diverged[folder])
        try:
            yield
        except NonFinite as error:
            self.diverged[folder] = f"{who}: {error}"
            raise NonFinite(self.diverged[folder]) from error

    def _folder(self, spec: Spec, seed: int, *parts: str) -> Path:
        """Folder of the network that `spec` makes, named by everything that it depends on."""
        program = program_sha256(Path(protecting.__file__))
        digest = fingerprint(str(spec), source_sha256(type(spec)), program, *parts, self.device.type)[:10]
        return self.folder / "teachers" / f"{type(spec).__name__.lower()}-{digest}-seed{seed}"


def _source(teacher: Teacher, seed: int) -> Source:
    """The teacher's images, divided anew for each seed."""
    return teacher.data.model_copy(update={"seed": seed})


def _of_teacher(pair: VictimPair) -> Measured:
    """The victim itself."""
    data, known = pair.data, pair.victim.record["metrics"]
    learnt = pair.victims["victim"].plain(data.train, data.num_classes)
    return Measured(
        100 * metrics.accuracy(pair.test_logits("victim"), data.test.labels),
        known.get("divergence"),
        validation_accuracy=100 * known["validation_accuracy"],
        train_accuracy=100 * metrics.accuracy(learnt, data.train.labels),
        environment=described(pair.victim.record["environment"]),
    )


PairSpec = tuple[Teacher, Defence | None, Teacher | None, float]
"""Key of the pair that a case needs: teacher, defence, adversary, and the attacker's share of the images."""


def _pair_spec(case: Case) -> PairSpec:
    return case.teacher, case.defence, case.adversary, case.share


def job(pair: VictimPair, case: Case, seed: int) -> Job:
    """The student of a case, before it is trained."""
    assert case.attack is not None
    assert case.student is not None
    side: Side = "none" if case.attack.needs == Access.NONE else "victim"
    return Job(pair, side, case.attack, case.student, seed, case.recipe)
