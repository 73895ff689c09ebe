"""The plan of `reproduce` in words, and a forecast of how long it takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

from torch import Tensor, nn

from undistill.attacks.attack import ThiefData
from undistill.auditing.forecast import Forecast, count, seconds_of
from undistill.auditing.students import Students
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.models.model import Model, frozen
from undistill.papers.case import Case, Runner, Teacher
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Oracle

Missing = Mapping[int, Sequence[Case]]
"""Values to measure, by seed."""
Train = Callable[[Split, Fit], object]


def describe(missing: Missing, values: int) -> str:
    """The networks that a table needs, as a sentence."""
    honest, protected, students = (len(kind) for kind in _networks(missing))
    todo, whole = sum(map(len, missing.values())), values * len(missing)
    kept = f" ({whole - todo} of {whole} are in the table)" if todo < whole else ""
    return (
        f"Plan: {count(todo, 'value')} to measure{kept}, from {count(honest, 'unprotected network')}, "
        f"{protected:,} protected and {count(students, 'student')}; what the folder holds is not trained again."
    )


def forecast(missing: Missing, runner: Runner) -> Forecast:
    """A forecast for all networks of a table. Networks in their initial state stand for those still to be trained."""
    found, load = Forecast(), cache(lambda source: source.load().split)
    rates: dict[object, float] = {}

    def add(kind: object, train: Train, teacher: Teacher, recipe: Recipe, share: float = 1.0) -> None:
        if kind not in rates:
            rates[kind] = share * seconds_of(train, load(teacher.data), recipe, runner.device)
        found.seconds += rates[kind]

    honest, protected, students = _networks(missing)
    for _, teacher in honest:
        add(teacher, partial(_train, teacher.model), teacher, teacher.recipe)
    for _, case in protected:
        add((case.teacher, case.defence), partial(_protect, case), case.teacher, case.teacher.recipe)
    for _, case in students:
        if case.attack and case.attack.data == ThiefData.NONE:
            found.untried.add(type(case.attack).__name__)
        else:
            kind = case.teacher, case.attack, case.student, case.recipe, case.share
            add(kind, partial(_attack, case), case.teacher, case.recipe, case.share)
    return found


def _networks(missing: Missing) -> tuple[set[tuple[int, Teacher]], set[tuple[int, Case]], set[tuple[int, Case]]]:
    """Honest teachers, protected ones, and students, each with its seed; a case stands for its network."""
    asked = [(seed, case) for seed, cases in missing.items() for case in cases]
    teachers = {(seed, each) for seed, case in asked for each in (case.teacher, case.adversary) if each}
    protected = {
        (seed, Case(teacher=case.teacher, defence=case.defence, adversary=case.adversary, name=""))
        for seed, case in asked
        if case.defence
    }
    students = {(seed, replace(case, name="", published=None)) for seed, case in asked if case.attack}
    return teachers, protected, students


def _train(model: Model, data: Split, fit: Fit) -> nn.Module:
    def objective(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"ce": cross_entropy(network(batch.images), batch.labels)}

    return fit(_initial(model, data, 0), data, objective, capturable=True)


def _protect(case: Case, data: Split, fit: Fit) -> nn.Module:
    assert case.defence is not None
    honest = frozen(_initial(case.teacher.model, data, 0)).to(fit.device)
    return case.defence.protect(honest, honest, lambda: _initial(case.teacher.model, data, 1), data, fit)


def _attack(case: Case, data: Split, fit: Fit) -> nn.Module:
    assert case.attack is not None
    assert case.student is not None
    victim = frozen(_initial(case.teacher.model, data, 0)).to(fit.device)
    students = Students(case.student, data.shape, data.num_classes, 0)
    return case.attack.run(Oracle(victim, case.attack.needs), students, data, fit)


def _initial(model: Model, data: Split, seed: int) -> nn.Module:
    return model.build(data.shape, data.num_classes, seed)
