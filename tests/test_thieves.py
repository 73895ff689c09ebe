"""Attacks get answers that are counted, budgets that end, what they train beside a student, second views."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import RECIPE, STUDENT, students
from tests.test_victims import Shares, jobs, made
from undistill import Extra, Form, Weighted
from undistill.api.audits import audit, plan_audit
from undistill.attacks import Attack
from undistill.attacks.attack import Buying, Distillation, ThiefData
from undistill.auditing.cell import Job
from undistill.auditing.pair import VictimPair
from undistill.auditing.plan import Plan
from undistill.auditing.suites import SUITES, Suite
from undistill.core.errors import BudgetExceeded, ModelError, SpecError
from undistill.core.progress import Progress
from undistill.core.unshown import LOG_ZERO
from undistill.data import Data, Split
from undistill.data.batches import Batch
from undistill.data.views import Views
from undistill.defences import Defence
from undistill.models.convnet import ConvNet
from undistill.runs.run import Run
from undistill.training.fit import Fit
from undistill.training.losses import cross_entropy, distillation
from undistill.training.metrics import accuracy, evaluate
from undistill.victims.answer import Answer
from undistill.victims.oracle import Access, Oracle
from undistill.victims.protected import Protected, Response
from undistill.victims.victim import Victim

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "budget"),
    [(name, 26) for name, spec in Attack.registry.items() if spec().needs == Access.QUERY] + [("SoftLabels", 5000)],
)
def test_a_budget_is_kept_and_ends_nothing(name: str, budget: int, victim: Run, pool: str, tmp_path: Path) -> None:
    if Attack.parse(name).data == ThiefData.SURROGATE:
        budget = min(budget, 90)  # images of the pool
    job = jobs(victim, name, pool, budget=budget)[0]
    job.check()
    cell = job.run(tmp_path / "cells", Progress.silent())
    assert not cell.diverged
    assert cell.queries <= budget == cell.budget
    assert cell.distinct <= cell.queries
    if Attack.parse(name).buying != Buying.CHOSEN:
        first, second = (job.data.train.image_digest for job in jobs(victim, name, pool, budget=26))
        assert first != second, "chosen by seed"


def test_a_budget_that_buys_nothing_is_said_before(victim: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"buys HardLabels.* less than two images in 6 epochs"):
        audit(victim, tmp_path / "a", students=[STUDENT], budget=11, recipe=RECIPE, device="cpu")
    with pytest.raises(SpecError, match="at least one query"):
        audit(victim, tmp_path / "a", students=[STUDENT], budget=0, device="cpu")
    assert not (tmp_path / "a").exists()


def test_who_overspends_is_lost_and_the_audit_goes_on(victim: Run, tmp_path: Path, monkeypatch) -> None:
    (job, _) = jobs(victim, "SoftLabels()", budget=30)
    monkeypatch.setattr(Job, "data", property(lambda self: self.pair.attackers))
    cell = job.run(tmp_path / "cells", Progress.silent())
    assert "query budget of 30 is spent" in cell.diverged


def test_an_unlabelled_thief_sees_no_labels(victim: Run) -> None:
    (job, _) = jobs(victim, "HardLabels()")
    assert not job.data.is_labelled
    (job, _) = jobs(victim, "SoftLabels()")
    assert job.data.is_labelled


def test_nothing_is_chosen_by_labels_that_a_thief_has_not(toy: Data) -> None:
    """A training that makes the network worse in the end: who may choose keeps an earlier epoch, others the last."""

    def gained(split: Split) -> float:
        fit = Fit(RECIPE.model_copy(update={"selection": "best", "epochs": 12}), 0, CPU)

        def objective(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
            ce = cross_entropy(student(batch.images), toy.train.labels[batch.index])
            return {"ce": ce if batch.epoch < 6 else -ce}

        network = fit(students(toy)(), split, objective)
        kept = accuracy(evaluate(network, toy.validation), toy.validation.labels)
        return kept - fit.history[-1]["validation_accuracy"]

    assert gained(toy.split.unlabelled) == 0
    assert gained(toy.split) > 0


# Plug-ins that ship only here: each shows that the types carry it.


class LabelOnly(Response):
    form = Form.LABEL

    def forward(self, answer: Answer, inputs: Tensor) -> Answer:
        shown = torch.zeros_like(answer.shown).scatter(1, answer.top[:, None], True)
        return Answer(torch.where(shown, 0.0, LOG_ZERO), shown)


def test_hard_labels_learn_from_a_label_only_victim(honest: Run, toy: Data) -> None:
    victim = Protected(honest.network(), [LabelOnly()]).eval()
    data = toy.attackers(0.1, 0).unlabelled

    def student(network: nn.Module) -> Tensor:
        attack = Attack.parse("HardLabels()")
        return evaluate(attack.run(Oracle(network, Access.QUERY), students(toy), data, Fit(RECIPE, 0, CPU)), toy.test)

    assert torch.equal(student(victim), student(honest.network())), "the label is all it takes"


def test_an_attack_that_needs_more_than_is_shown_is_refused(honest: Run, tmp_path: Path) -> None:
    run = made(honest, tmp_path / "run", "TopK(k=1)")
    (job, _) = jobs(run, "AffineMap()")
    job.check()
    job.pair.victims["victim"].network.responses.append(LabelOnly())
    with pytest.raises(ModelError, match=r"needs answers of the form TOP.*no more than LABEL"):
        job.check()


class Whole(Distillation):
    """The common base of the next four attacks."""

    listed = False

    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> dict[str, object]:
        return {"soft": distillation(answer.filled, student(batch.images), 2.0)}


def run_attack(attack: Attack, honest: Run, toy: Data, budget: int | None = None) -> tuple[nn.Module, Fit, Oracle]:
    oracle, fit = Oracle(honest.network(), attack.needs, budget), Fit(RECIPE, 0, CPU)
    return attack.run(oracle, students(toy), toy.attackers(0.1, 0), fit), fit, oracle


@pytest.mark.parametrize("optimiser", ["same", "adam", "sgd"])
def test_a_generator_with_an_optimiser_of_its_own(optimiser: str, honest: Run, toy: Data) -> None:
    noise = nn.Conv2d(1, 1, 3, padding=1)
    before = noise.weight.clone()

    class Generated(Whole):
        def run(self, oracle, fresh, data, fit):  # type: ignore[no-untyped-def]
            def objective(student: nn.Module, batch: Batch) -> dict[str, object]:
                images = batch.images + noise(batch.images)
                soft = distillation(oracle(batch).filled, student(images), 2.0)
                return {"soft": soft, "size": Weighted(noise.weight.square().sum(), 0.1)}

            return fit(fresh(), data, objective, extra=[Extra(noise, optimiser, lr_scale=0.5, decay=0.0)])

    run_attack(Generated(), honest, toy)
    assert not torch.equal(noise.weight, before)
    assert not noise.training


def test_a_second_view_of_each_batch(honest: Run, toy: Data) -> None:
    """Another kind of view of the same images: drawn apart, and the same for the same seed."""
    seen: list[Tensor] = []

    class Consistent(Whole):
        def run(self, oracle, fresh, data, fit):  # type: ignore[no-untyped-def]
            strong = fit.views(data.train, Views(crop=0.25, cutout=0.5), "strong")

            def objective(student: nn.Module, batch: Batch) -> dict[str, object]:
                images = batch.seen_as(strong)
                seen.append(images)
                assert not torch.equal(images, batch.images)
                return {"same": cross_entropy(student(images), oracle(batch).top)}

            return fit(fresh(), data, objective)

    run_attack(Consistent(), honest, toy)
    first, seen[:] = list(seen), []
    run_attack(Consistent(), honest, toy)
    assert all(map(torch.equal, first, seen))


def test_a_student_with_auxiliary_heads(honest: Run, toy: Data) -> None:
    class Exits(Whole):
        def run(self, oracle, fresh, data, fit):  # type: ignore[no-untyped-def]
            student = fresh()
            stage, maps = fresh.stages(student)[1], []
            handle = stage.register_forward_hook(lambda _, inputs, output: maps.append(output))
            head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(data.num_classes))
            student(torch.zeros(2, *data.shape))
            head(maps.pop())

            def objective(network: nn.Module, batch: Batch) -> dict[str, object]:
                answer, logits = oracle(batch).filled, network(batch.images)
                early = head(maps.pop())
                return {"soft": distillation(answer, early, 2.0), "ce": cross_entropy(logits, batch.labels)}

            student = fit(student, data, objective, extra=[Extra(head)])
            handle.remove()
            return student

    student, fit, _ = run_attack(Exits(), honest, toy)
    assert fit.history[-1]["soft"] < fit.history[0]["soft"]
    assert accuracy(evaluate(student, toy.test), toy.test.labels) > 0.4


def test_an_active_thief_with_a_budget(honest: Run, toy: Data) -> None:
    class Active(Whole):
        buying = Buying.CHOSEN
        data = ThiefData.UNLABELLED

        def run(self, oracle, fresh, data, fit):  # type: ignore[no-untyped-def]
            half = oracle.ledger.left // 2
            first = data.some(half, 0)
            bought = oracle.once(first.train, data.num_classes)
            again = oracle.once(first.train, data.num_classes)
            assert torch.equal(bought.log_p, again.log_p)

            def objective(student: nn.Module, batch: Batch) -> dict[str, object]:
                return {"soft": distillation(bought.filled[batch.index], student(batch.images), 2.0)}

            student = fit(fresh(), first, objective)
            with pytest.raises(BudgetExceeded):
                oracle.once(data.train, data.num_classes)
            return student

    _, _, oracle = run_attack(Active(), honest, toy, budget=20)
    assert (oracle.ledger.billed, oracle.ledger.distinct, oracle.ledger.left) == (10, 10, 10)


def test_a_resumed_ledger_knows_what_was_asked(honest: Run, toy: Data) -> None:
    oracle, other = (Oracle(honest.network(), Access.QUERY) for _ in range(2))
    data = toy.attackers(0.1, 0)
    Attack.parse("SoftLabels()").run(oracle, students(toy), data, Fit(RECIPE, 0, CPU))
    other.load_state_dict(json.loads(json.dumps(oracle.state_dict())))
    assert (other.ledger.billed, other.ledger.distinct) == (oracle.ledger.billed, oracle.ledger.distinct)
    assert oracle.ledger.distinct == RECIPE.epochs * len(data.train)
    few = RECIPE.model_copy(update={"views": Views(n_views=2)})
    Attack.parse("SoftLabels()").run(
        other := Oracle(honest.network(), Access.QUERY), students(toy), data, Fit(few, 0, CPU)
    )
    assert other.ledger.distinct == 2 * len(data.train)


@pytest.mark.parametrize(("attack", "images"), [("SoftLabels()", 60 // 4), ("SoftLabels(once=True)", 60)])
def test_who_asks_nobody_has_the_images_of_the_plain_thief_with_a_budget(
    attack: str, images: int, victim: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = str(Attack.parse(attack))
    suite = Suite("", attacks=("Scratch()", "HardLabels()", attack), students=(STUDENT,))
    monkeypatch.setitem(SUITES, "one", suite)
    recipe = RECIPE.model_copy(update={"epochs": 4})
    planned = Plan.of([VictimPair.of(victim, None, [0], None)], "one", (), (), recipe, budget=60).jobs
    thief, alone = ({job.side: job for job in planned if str(job.attack) == name} for name in (attack, "Scratch()"))
    assert len(thief["victim"].data.train) == images
    assert alone["none"].data.train.image_digest == thief["victim"].data.train.image_digest
    assert alone["none"].data.is_labelled


def test_what_a_suite_lists_and_a_network_does_not_allow_is_left_out(
    victim: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And said; what the user named is refused."""
    monkeypatch.setitem(SUITES, "one", Suite("", attacks=("Scratch()", "HardLabels()", "SoftLabels()", "Skeptical()")))
    monkeypatch.setattr(ConvNet, "stages", lambda self, network: [network])
    plan = plan_audit(victim, suite="one", students=[STUDENT], recipe=RECIPE, device="cpu")
    assert {type(job.attack).__name__ for job in plan.jobs} == {"Scratch", "HardLabels", "SoftLabels"}
    ((name, why),) = plan.skipped.items()
    assert name.startswith("Skeptical")
    assert "names a single one" in why
    report = audit(victim, tmp_path / "a", suite="one", students=[STUDENT], seeds=1, recipe=RECIPE, device="cpu")
    assert report.skipped == dict(plan.skipped)
    assert [flag.message for flag in report.flags if flag.name == "not_tried" and why in flag.message]
    with pytest.raises(ModelError, match="names a single one"):
        plan_audit(victim, suite="one", attacks=["Skeptical()"], students=[STUDENT], recipe=RECIPE, device="cpu")
    (tmp_path / "flat.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(1, 1)\n")
    with pytest.raises(ModelError, match=r"flat\.py:make"):  # of no use to any attack
        plan_audit(victim, suite="one", students=[f"{tmp_path / 'flat.py'}:make"], recipe=RECIPE, device="cpu")


def test_a_thief_who_chooses_is_not_refused(victim: Run) -> None:
    class Chooser(Whole):
        buying = Buying.CHOSEN

    (job, _) = jobs(victim, "SoftLabels()", budget=3)
    replace(job, attack=Chooser()).check()
    assert len(replace(job, attack=Chooser()).data.train) == len(job.pair.attackers.train)
    with pytest.raises(SpecError, match="less than two images"):
        job.check()


def test_a_thief_without_data_gets_no_images(victim: Run) -> None:
    class Peeping(Whole):
        data = ThiefData.NONE

    class Elsewhere(Whole):
        data = ThiefData.SURROGATE

    (job, _) = jobs(victim, "SoftLabels()")
    given = replace(job, attack=Peeping()).data
    assert not given.train.pixels.any()
    assert not given.is_labelled
    with pytest.raises(SpecError, match=r"other images than the owner's; name some: --pool"):
        replace(job, attack=Elsewhere()).check()


def test_an_adaptive_thief_is_told_the_defence(victim: Run) -> None:
    assert jobs(victim, "AffineMap()")[0]._told == ", ".join(victim.record["defences"])
    assert jobs(victim, "SoftLabels()")[0]._told is None


def test_a_victim_need_not_be_a_network(toy: Data) -> None:
    class Constant(Victim):
        classes = toy.classes
        identity = "constant"
        repeatable = True
        form = Form.FULL

        def answer(self, inputs: Tensor, at: str = "") -> Answer:
            return Answer.of_logits(torch.eye(3)[torch.zeros(len(inputs), dtype=torch.int64)])

    oracle = Oracle(Constant(), Access.QUERY)
    network = Attack.parse("HardLabels()").run(oracle, students(toy), toy.split.unlabelled, Fit(RECIPE, 0, CPU))
    assert (evaluate(network, toy.test).argmax(1) == 0).all()
    assert oracle.ledger.billed == RECIPE.epochs * len(toy.train)


def test_a_probe_is_called_in_eval_mode_and_changes_nothing(toy: Data) -> None:
    def trained(watch: object) -> nn.Module:
        fit = Fit(RECIPE, 0, CPU, watch=watch)  # type: ignore[arg-type]
        return Attack.parse("Scratch()").run(Oracle(Shares(), Access.NONE), students(toy), toy.split, fit)

    seen: list[bool] = []
    plain, watched = trained(None), trained(lambda network: seen.append(network.training))
    assert seen == [False] * RECIPE.epochs
    assert all(map(torch.equal, plain.state_dict().values(), watched.state_dict().values()))


def test_second_views_may_be_mixed(toy: Data) -> None:
    dataset = Fit(RECIPE, 0, CPU).views(toy.train, Views(mixup=0.5), "mixed")
    images, _ = dataset.show(0, torch.arange(4))
    assert images.shape == (4, *toy.shape)


def test_whole_steps_are_not_rounded_down() -> None:
    rounded = Defence.parse("Rounding(digits=1)").response((1, 4, 4), 4)  # type: ignore[attr-defined]
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    once = rounded(Answer.of_logits(p.log()), torch.zeros(1))
    assert torch.allclose(once.log_p.exp(), p, atol=1e-5)
    hidden = Answer(once.log_p, torch.tensor([[True, True, False, False]]))
    assert torch.allclose(rounded(hidden, torch.zeros(1)).log_p.exp()[0, :2], p[0, :2], atol=1e-5)
