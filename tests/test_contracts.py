"""Contracts over every registered attack and defence; a new file is tested here at birth."""

import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import RECIPE, STUDENT, These, students
from undistill.attacks import Attack
from undistill.attacks.attack import Buying, Role, ThiefData
from undistill.core.errors import BudgetExceeded, ModelError, SpecError
from undistill.core.progress import Progress, Task
from undistill.core.seeds import seeded
from undistill.core.spec import Spec
from undistill.data import Data, Samples, Split
from undistill.data.batches import Batch
from undistill.defences import Defence
from undistill.models import Model
from undistill.runs.run import Run
from undistill.training.fit import Fit
from undistill.training.metrics import accuracy, evaluate
from undistill.training.objectives import Terms
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Access, Oracle

CPU = torch.device("cpu")
# So small that it is done in a moment, and so calm that any seed does; a new attack needs a line here only where its
# defaults are large.
SMALL = {
    "AdaptiveMisinformation": {"tau": 0.9, "nu": 10, "epochs": 1},
    "DAFL": {"lr": 0.005, "width": 16},
    "ActiveThief": {"rounds": 3},
    "DKD": {"warmup": 0.5},
    "DeepInversion": {"count": 48, "steps": 6},
    "DisGUIDE": {"lr": 0.005, "memory": 200, "width": 16},
    "GradientRedirection": {"epsilon": 0.4, "epochs": 1},
    "Fast": {"bank": 40, "every": 3, "warmup": 1, "width": 16},
    "FixMatch": {"mu": 2, "threshold": 0.5},
    "LSKD": {"floor": 0.01},
    "LinearCMI": {"steps": 2},
    "MAD": {"epochs": 1},
    "PBayes": {"draws": 4, "rounds": 1},
    "Skeptical": {"wait": 0.2},
    "Stingy": {"share": 0.4},
    "ZSKT": {"student_steps": 2, "width": 16},
}
ATTACKS = [spec(**SMALL.get(name, {})) for name, spec in Attack.registry.items()]
DEFENCES = [spec(**SMALL.get(name, {})) for name, spec in Defence.registry.items()]
attacks = pytest.mark.parametrize("attack", ATTACKS, ids=str)
defences = pytest.mark.parametrize("defence", DEFENCES, ids=str)


def fields(specs: list[Spec]) -> Iterator[Any]:
    for spec in specs:
        for name in type(spec).model_fields:
            yield pytest.param(spec, name, id=f"{type(spec).__name__}.{name}")


def others(spec: Spec, name: str) -> Iterator[Spec]:
    """The same spec with other valid values of one field, such as half and double the number that it is."""
    value = getattr(spec, name)
    numbers = [value / 2, value * 2, value * 1000] if isinstance(value, int | float) else [0.5, 2]
    choices = get_args(type(spec).model_fields[name].annotation)
    for other in [not value] if isinstance(value, bool) else [*map(type(value or 0.0), numbers), *choices]:
        with suppress(SpecError):
            changed = type(spec)(**(spec.model_dump() | {name: other}))
            if changed != spec:
                yield changed


def student(
    data: Data, attack: Attack, victim: nn.Module, oracle: Oracle | None = None, recipe: Recipe = RECIPE, seed: int = 0
) -> nn.Module:
    oracle = oracle or Oracle(victim, attack.needs)
    with seeded(seed):
        return attack.run(oracle, students(data, seed=seed), thief(data, attack), Fit(recipe, seed, CPU))


def thief(data: Data, attack: Attack) -> Split:
    """Data of the attacker, without labels if he needs none, or other images."""
    split = data.attackers(0.1, 0)
    if attack.data == ThiefData.SURROGATE:
        split = replace(split, train=Samples(255 - split.train.pixels.flip(2), split.train.labels))
    return split if attack.data in (ThiefData.LABELLED, ThiefData.NONE) else split.unlabelled


@dataclass(frozen=True)
class Plain:
    """One run of an attack with small defaults and seed 0."""

    student: nn.Module
    victim: nn.Module
    asked: list[Access]
    billed: int


@pytest.fixture(scope="session")
def plain(toy: Data, honest: Run) -> Callable[[Attack], Plain]:
    @cache
    def run(attack: Attack) -> Plain:
        asked: list[Access] = []

        class Watching(Oracle):
            def _require(self, access: Access, deed: str) -> None:
                asked.append(access)
                super()._require(access, deed)

        victim = honest.network()
        oracle = Watching(victim, Access.WEIGHTS)
        return Plain(student(toy, attack, victim, oracle), victim, asked, oracle.ledger.billed)

    return run


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


def alike(a: nn.Module, b: nn.Module, data: Data) -> bool:
    """Whether both give the same answers to the test images."""
    return torch.equal(evaluate(a, data.test), evaluate(b, data.test))


def protected(data: Data, defence: Defence, honest: Run) -> nn.Module:
    reference = Run.open(defence.reference or honest.folder).network()
    return defence.protect(honest.network(), reference, lambda: honest.fresh(1), data.split, Fit(RECIPE, 0, CPU))


@pytest.mark.parametrize("spec", [*ATTACKS, *DEFENCES], ids=str)
def test_text_names_the_spec(spec: Spec) -> None:
    family = Attack if isinstance(spec, Attack) else Defence
    assert family.parse(str(spec)) == spec
    assert family.parse(type(spec).__name__) == type(spec)()
    assert type(spec).__doc__


class Interrupted(Progress):
    """Ctrl-C in the fourth epoch of the first training."""

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        yield self

    def __init__(self) -> None:
        super().__init__(None)
        self.epochs = 0

    def advance(self, note: str = "") -> None:
        """Images that an attack makes are no epochs."""

    def reach(self, done: int, note: str) -> None:
        self.epochs += 1
        if self.epochs == 4:
            raise KeyboardInterrupt


@attacks
def test_same_seed_same_bits_even_of_a_stopped_attack(
    attack: Attack,
    toy: Data,
    honest: Run,
    plain: Callable[[Attack], Plain],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Generators, banks and images that an attack made are part of what is kept."""
    monkeypatch.setattr("undistill.training.loop.CHECKPOINT_SECONDS", 0.0)

    def go(progress: Progress) -> nn.Module:
        oracle = Oracle(honest.network(), attack.needs)
        fit = Fit(RECIPE, 0, CPU, tmp_path, progress, carried=(oracle,))
        with seeded(0):
            return attack.run(oracle, students(toy), thief(toy, attack), fit)

    with pytest.raises(KeyboardInterrupt):
        go(Interrupted())
    assert same(go(Progress.silent()), plain(attack).student)


@pytest.mark.parametrize("attack", [one for one in ATTACKS if one.role != Role.BLACK_BOX], ids=str)
def test_students_beat_chance(attack: Attack, toy: Data, honest: Run, plain: Callable[[Attack], Plain]) -> None:
    """In the mean of three seeds: one alone may be lost, and on which machine is a matter of rounding. Those that must
    first make their images get more time, the one whose generator plays against the student most. Who has neither data
    nor weights learns too little of stripes: see `test_digits.py`."""
    epochs = {"ZSKT": 60}.get(type(attack).__name__, 20) if attack.needs == Access.WEIGHTS else RECIPE.epochs
    recipe = RECIPE.model_copy(update={"epochs": epochs})
    first = [plain(attack).student] if recipe == RECIPE else []
    others = range(len(first), 3)
    networks = [*first, *(student(toy, attack, honest.network(), recipe=recipe, seed=seed) for seed in others)]
    assert statistics.fmean(accuracy(evaluate(one, toy.test), toy.test.labels) for one in networks) > 0.45


@attacks
def test_no_more_access_than_declared(attack: Attack, plain: Callable[[Attack], Plain]) -> None:
    assert max(plain(attack).asked, default=Access.NONE) == attack.needs


def test_data_free_attacks_that_read_statistics_need_some(toy: Data) -> None:
    victim = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ModelError, match="the victim has none"):
        student(toy, Attack.parse("DeepInversion(count=12, steps=2)"), victim)
    student(toy, Attack.parse("DeepInversion(count=12, steps=2, statistics=0)"), victim)
    untracked = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(144, 3))
    student(toy, Attack.parse("Fast()"), untracked)


@pytest.mark.parametrize("attack", [one for one in ATTACKS if one.data == ThiefData.NONE], ids=str)
def test_who_needs_no_data_has_none(attack: Attack, toy: Data, honest: Run) -> None:
    """Other images, and other labels, by which another epoch would be chosen: the same student."""
    train = Samples(255 - toy.train.pixels, (toy.train.labels + 1) % toy.num_classes)
    recipe = RECIPE.model_copy(update={"selection": "best", "epochs": 4})
    one, other = (student(data, attack, honest.network(), recipe=recipe) for data in (toy, replace(toy, train=train)))
    assert same(one, other)


@attacks
def test_an_attack_without_an_epoch_leaves_the_student_as_it_was(
    attack: Attack, toy: Data, honest: Run, tmp_path: Path
) -> None:
    network = Model.parse(STUDENT).build(toy.shape, toy.num_classes, 0)
    fit = Fit(RECIPE.model_copy(update={"epochs": 0}), 0, CPU, sheet=tmp_path / "sheet.png")
    attack.run(Oracle(honest.network(), attack.needs), These(network, network, network), thief(toy, attack), fit)
    assert same(network, Model.parse(STUDENT).build(toy.shape, toy.num_classes, 0))


@attacks
def test_queries_are_counted_and_the_budget_stops_them(
    attack: Attack, toy: Data, honest: Run, plain: Callable[[Attack], Plain]
) -> None:
    billed = plain(attack).billed
    assert (billed > 0) == (attack.needs == Access.QUERY)
    if not billed:
        return
    student(toy, attack, honest.network(), Oracle(honest.network(), attack.needs, budget=billed))
    short = Oracle(honest.network(), attack.needs, budget=billed - 1)
    with nullcontext() if attack.buying == Buying.CHOSEN else pytest.raises(BudgetExceeded):
        student(toy, attack, honest.network(), short)
    assert short.ledger.billed <= billed - 1


@attacks
def test_the_victim_is_left_as_it_was(attack: Attack, honest: Run, plain: Callable[[Attack], Plain]) -> None:
    assert same(plain(attack).victim, honest.network())


@pytest.mark.parametrize(("attack", "field"), list(fields(ATTACKS)))
def test_every_field_of_an_attack_changes_the_run(
    attack: Attack, field: str, toy: Data, honest: Run, plain: Callable[[Attack], Plain]
) -> None:
    def run(changed: Attack) -> tuple[nn.Module, int]:
        oracle = Oracle(honest.network(), changed.needs)
        return student(toy, changed, honest.network(), oracle), oracle.ledger.billed

    before = plain(attack)
    runs = (run(changed) for changed in others(attack, field))
    assert any(not same(before.student, after) or before.billed != billed for after, billed in runs)


@defences
def test_defences_repeat_and_leave_the_teacher_alone(defence: Defence, toy: Data, honest: Run) -> None:
    teacher = honest.network()
    victims = [
        defence.protect(teacher, teacher, lambda: honest.fresh(1), toy.split, Fit(RECIPE, 0, CPU)) for _ in range(2)
    ]
    assert same(*victims)
    assert same(teacher, honest.network())
    assert not alike(teacher, victims[0], toy)


@defences
def test_defended_teachers_stay_accurate(defence: Defence, toy: Data, honest: Run) -> None:
    answers = evaluate(protected(toy, defence, honest), toy.test)
    assert answers.shape == (len(toy.test), 3)
    assert accuracy(answers, toy.test.labels) > 0.8


BUCKETS_MERGE = "Sealed.levels"  # on the toy world, where all answers are right; see tests/test_sealed.py


@pytest.mark.parametrize(("defence", "field"), [one for one in fields(DEFENCES) if one.id != BUCKETS_MERGE])
def test_every_field_of_a_defence_changes_the_run(
    defence: Defence, field: str, toy: Data, honest: Run, victim: Run
) -> None:
    plain = protected(toy, defence, honest)
    choices = others(defence, field)
    named = {
        "adversary": {"adversary": str(victim.folder)},
        "surrogate": {"surrogate": "ConvNet(width=4)"},
        "price": {"omega": None, "price": 1},
    }
    if field in named:
        choices = iter([type(defence)(**(defence.model_dump() | named[field]))])
    assert any(not alike(plain, protected(toy, changed, honest), toy) for changed in choices)


class NothingRead(TorchDispatchMode):
    """Fails where a value is read from a tensor, or where the shape of a result depends on values.

    Optimisers may: for GPUs they keep their counts on the CPU. So may `RememberedAnswers`, once an epoch.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        masked = func is aten.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1])
        if masked or func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default):
            files = [Path(frame.filename).as_posix() for frame in traceback.extract_stack()]
            assert any("torch/optim" in file or file.endswith("training/answers.py") for file in files), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", [*ATTACKS, *DEFENCES], ids=str)
def test_objectives_do_not_wait_for_a_gpu(
    spec: Attack | Defence, toy: Data, honest: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that an objective reads, or branches on, stops the GPU's queue at every step."""
    plain_fit = Fit.__call__

    def watched_fit(self: Fit, network: Any, data: Any, objective: Any, **others: Any) -> nn.Module:
        def watched(network: nn.Module, batch: Batch) -> Terms:
            with NothingRead():
                return objective(network, batch)

        return plain_fit(self, network, data, watched, **others)

    monkeypatch.setattr(Fit, "__call__", watched_fit)
    short = RECIPE.model_copy(update={"epochs": 2})
    if isinstance(spec, Attack):
        student(toy, spec, honest.network(), recipe=short)
    else:
        protected(toy, spec, honest)


def test_a_value_that_is_read_is_seen() -> None:
    with NothingRead():
        torch.ones(2).sum()
        with pytest.raises(AssertionError, match="scalar"):
            torch.ones(2).sum().item()
        with pytest.raises(AssertionError, match="index"):
            torch.ones(2)[torch.tensor([True, False])]


@pytest.mark.parametrize("folder", ["attacks", "defences"])
def test_one_file_each(folder: str) -> None:
    family = Attack if folder == "attacks" else Defence
    files = [spec.__module__ for spec in family.registry.values() if not spec.origin]
    assert len(files) == len(set(files))


@defences
def test_no_gradient_reaches_the_teacher(defence: Defence, toy: Data, honest: Run) -> None:
    teacher = honest.network().requires_grad_(True)
    defence.protect(teacher, teacher, lambda: honest.fresh(1), toy.split, Fit(RECIPE, 0, CPU))
    assert all(parameter.grad is None for parameter in teacher.parameters())
