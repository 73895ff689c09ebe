"""Thieves tune on validation images: what is tried, what is chosen, and what is kept."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import RECIPE, STUDENT
from tests.test_victims import jobs
from undistill.api.audits import audit, plan_audit
from undistill.attacks import Attack
from undistill.attacks.attack import tries
from undistill.auditing.cell import Job, late_gain, relisted
from undistill.auditing.launchers import Serial
from undistill.auditing.schema import Trial
from undistill.auditing.statistics import preferred
from undistill.auditing.suites import SUITES, Tuning
from undistill.auditing.tuning import COMMON, SEED, UNINFORMED, Grid, Optuna, Search, configured, trial_of, tune
from undistill.core.errors import SpecError
from undistill.core.progress import Progress
from undistill.models import Model
from undistill.runs.run import Run

FROZEN = {
    "floors-1": "69568e4d5742",
    "quick-2": "733f6125ce49",
    "standard-1": "0e5bab0ba3ef",
    "thorough-1": "7a8d51b0f027",
    "white-box-1": "50ce7e6916fb",
    "budget-1": "09a21163e999",
}


def content(name: str) -> str:
    """Hash of everything that a suite is, what its thieves try included."""
    suite = SUITES[name]
    spaces = [sorted(Attack.parse(text).space.items()) for text in suite.attacks]
    parts = suite.attacks, suite.students, str(suite.tuning), spaces, sorted(COMMON.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_never_changes(name: str) -> None:
    """A changed suite gets a new number; the old one stays."""
    assert FROZEN[name] == content(name)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_says_all_of_its_fields(name: str) -> None:
    """A default that changes later is no part of it."""
    suite = SUITES[name]
    assert [str(Attack.parse(text)) for text in suite.attacks] == list(suite.attacks)
    assert [str(Model.parse(text)) for text in suite.students] == list(suite.students)
    assert "MKD" not in str(suite.attacks)
    assert suite.about[-1] == "."


@pytest.mark.parametrize("name", Attack.registry)
def test_what_a_thief_tries_is_valid_and_holds_the_default(name: str) -> None:
    attack = Attack.registry[name]()
    for field, values in attack.space.items():
        assert getattr(attack, field) in values
        for value in values:
            type(attack)(**(attack.model_dump() | {field: value}))


def trial(job: Job, score: float) -> Trial:
    column = {"side": job.side, "attack": str(job.attack), "listed": "", "student": STUDENT, "seed": SEED}
    return Trial(**column, recipe=str(job.recipe), score=score, validation=score, queries=0, seconds=1.0)


@pytest.mark.parametrize("kind", [Grid, Optuna])
def test_proposals_are_of_the_space_and_the_same_for_the_same_seed(kind: Any) -> None:
    space = {"T": (1.0, 4.0), "sides": ("victim", "both")}
    first, again, other = (kind(space, seed) for seed in (0, 0, 1))
    asked = []
    for proposals in (first, again, other):
        asked.append([])
        for number in range(8):
            asked[-1].append(proposals.next())
            proposals.tell(asked[-1][-1], number / 10)
    assert asked[0] == asked[1] != asked[2]
    assert all(setting["T"] in space["T"] and setting["sides"] in space["sides"] for setting in asked[0])
    assert len({str(setting) for setting in asked[0]}) > 1


def test_optuna_learns_from_scores() -> None:
    """Told that one value is good, it proposes that more often than chance."""
    for good in (1.0, 4.0, 20.0):
        learner, found = Optuna({"T": (1.0, 4.0, 20.0), "alpha": (0.5, 0.9)}, 0), []
        for _ in range(30):
            found.append(learner.next())
            learner.tell(found[-1], 1.0 * (found[-1]["T"] == good))
        learner.tell({"T": 7.0, "alpha": 0.5}, 1.0)  # a listed setting may be outside
        assert sum(setting["T"] == good for setting in found[10:]) > 9


def test_the_best_setting_is_chosen_and_the_listed_one_wins_ties(victim: Run) -> None:
    search = Search.of(jobs(victim, "SoftLabels()")[0], Tuning(trials=4, share=0.5))
    scores = iter((0.5, 0.9, 0.9, 0.1))
    while asked := search.ask():
        for one in asked:
            assert one.seed == SEED
            assert one.schedule.epochs == 2
            search.tell(trial(one, next(scores)))
    assert len({str(job.attack) + str(job.recipe) for job in search.asked}) == 4, "nothing is tried twice"
    assert str(search.asked[0].attack) == "SoftLabels(T=4, alpha=0.9)"
    assert search.best == search.asked[1]
    assert search.best.listed == "SoftLabels(T=4, alpha=0.9)"
    assert search.best.recipe.epochs == 4, "the best setting is trained in full"


def test_settings_that_wait_for_no_score_are_tried_side_by_side(victim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs(victim, "SoftLabels()")[0]
    search = Search.of(job, Tuning(trials=9))
    first = search.ask()
    assert len(first) == UNINFORMED
    for one in first:
        search.tell(trial(one, 0.5))
    assert len(search.ask()) == 1, "what comes next is learnt from these"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert len(Search.of(job, Tuning(trials=9)).ask()) == 9


def test_a_search_space_that_does_not_fit_its_attack_is_said_before(victim: Run) -> None:
    class Odd(Attack.registry["SoftLabels"]):
        listed = False
        space = tries(T=(1.0, -4.0))

    class Misspelt(Odd):
        listed = False
        space = tries(tau=(1.0,))

    job = jobs(victim, "SoftLabels()")[0]
    for attack, said in ((Odd(), "search space of Odd: .*T = -4"), (Misspelt(), "search space of Misspelt: .*tau")):
        with pytest.raises(SpecError, match=said):
            replace(job, attack=attack).check()


def test_a_search_ends_where_nothing_is_left(victim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undistill.auditing.tuning.COMMON", {"recipe.lr": (1.0, 0.5)})
    job = jobs(victim, "Knockoff()")[0]
    monkeypatch.setattr(type(job.attack), "space", {})
    search = Search.of(job, Tuning(trials=1000))
    while asked := search.ask():
        assert len(search.asked) < 50
        for one in asked:
            search.tell(trial(one, 0.5))
    assert 2 <= len(search.trials) <= 4
    assert not search.ask(), "it has ended, however long others search"


def test_settings_change_the_attack_and_the_recipe(victim: Run) -> None:
    job = jobs(victim, "SoftLabels()")[0]
    found = configured(job, {"T": 20.0, "recipe.lr": 3.0, "recipe.clip": 0.2})
    assert str(found.attack) == "SoftLabels(T=20, alpha=0.9)"
    assert found.recipe.lr == pytest.approx(3 * job.recipe.lr)
    assert found.recipe.clip == pytest.approx(1.0)
    assert configured(job, dict.fromkeys(COMMON, 1.0)).recipe == job.recipe


def test_trials_never_see_test_images(victim: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from undistill.training import metrics

    job = jobs(victim, "SoftLabels()")[0]
    test, seen = job.pair.data.test.labels, []
    real = metrics.accuracy

    def watched(logits: Any, labels: Any) -> float:
        seen.append(labels)
        return real(logits, labels)

    monkeypatch.setattr("undistill.auditing.cell.metrics.accuracy", watched)
    (tried, *_), _ = tune([job], Tuning(trials=1), Serial(), tmp_path / "cells", Progress.silent())
    assert seen
    assert not any(labels is test for labels in seen)
    assert tried.score == tried.validation > 0


def test_a_thief_without_labels_goes_by_what_the_victim_says(victim: Run, tmp_path: Path) -> None:
    job = jobs(victim, "SoftOnly()")[0]
    (tried, *_), _ = tune([job], Tuning(trials=1, share=1), Serial(), tmp_path / "cells", Progress.silent())
    pair = job.pair
    samples = pair.attackers.validation
    answers = pair.victims["victim"].plain(samples, 3).argmax(1)
    with torch.no_grad():
        pair.victims["victim"].plain = lambda *_: torch.eye(3)[(answers + 1) % 3]  # type: ignore[method-assign]
    (again, *_), _ = tune([job], Tuning(trials=1, share=1), Serial(), tmp_path / "other", Progress.silent())
    assert again.validation == tried.validation
    assert again.score < 0.5 < tried.score, "by what the victim says, whatever is true"


def test_answers_by_which_a_thief_without_labels_is_judged_are_counted(victim: Run, tmp_path: Path) -> None:
    for name, granted in (("SoftOnly()", True), ("SoftLabels()", False)):
        job = jobs(victim, name)[0]
        (tried, *_), _ = tune([job], Tuning(trials=1, share=0.2), Serial(), tmp_path / "cells", Progress.silent())
        assert tried.granted == granted * len(job.pair.attackers.validation)


def test_a_trial_buys_as_many_images_as_the_whole_training(victim: Run) -> None:
    job = jobs(victim, "SoftLabels()", budget=60)[0]
    tried = trial_of(job, 0.5)
    assert tried.schedule.epochs == job.schedule.epochs / 2
    assert len(tried.data.train) == 60 // job.recipe.epochs
    assert tried.data.train.image_digest == job.data.train.image_digest, "those of the first student"


def test_an_audit_tunes_measures_the_best_and_resumes(victim: Run, tmp_path: Path) -> None:
    def go(out: Path) -> Any:
        return audit(
            victim, out, students=[STUDENT], seeds=2, trials=2, share=0.5, recipe=RECIPE, device="cpu", suite="quick-2"
        )

    report = go(tmp_path / "a")
    assert len(report.trials) == 2 * 10
    assert {trial.seed for trial in report.trials} == {SEED}
    assert {cell.seed for cell in report.cells} == {0, 1}
    for cell in report.cells:
        listed = cell.listed or cell.attack
        tried = [
            t for t in report.trials if (t.side, t.listed or t.attack, t.student) == (cell.side, listed, cell.student)
        ]
        assert len(tried) == 2
        assert cell.attack == tried[preferred([one.score for one in tried], tried[0].images)].attack
    whole = (tmp_path / "a" / "report.json").read_bytes()
    kept = sorted((tmp_path / "a" / "cells").glob("*.json"))
    for path in kept[::3]:
        path.unlink()
    assert len(kept) == 20 + 20
    assert _stripped(go(tmp_path / "a").model_dump_json()) == _stripped(whole.decode())


def _stripped(text: str) -> Any:
    """A report without times."""
    report = json.loads(text)
    for part in [*report["cells"], *report["trials"]]:
        part.pop("seconds")
    report.pop("costs")
    return report


def test_bad_tuning_is_said_in_a_sentence(victim: Run) -> None:
    for fields, said in (({"trials": 0}, "trials = 0 is refused"), ({"share": 1.5}, "share = 1.5 is refused")):
        with pytest.raises(SpecError, match=said):
            plan_audit(victim, students=[STUDENT], device="cpu", **fields)


def test_trials_and_cells_have_keys_of_their_own(victim: Run) -> None:
    job = jobs(victim, "SoftLabels()")[0]
    keys = {job.key, trial_of(job, 1.0).key, trial_of(job, 0.5).key, replace(job, seed=SEED).key}
    assert len(keys) == 4


def test_two_attacks_that_are_tuned_to_one_setting_keep_their_columns(victim: Run, tmp_path: Path) -> None:
    job = jobs(victim, "SoftLabels()")[0]
    both = [replace(job, listed=name) for name in ("SoftLabels(T=1, alpha=0.9)", "SoftLabels(T=20, alpha=0.9)")]
    found = Serial().run(both, tmp_path / "cells", Progress.silent())
    assert [cell.listed for cell in found] == [one.listed for one in both]
    assert [relisted(found[0], one).column[1] for one in both] == [one.listed for one in both]


def test_what_is_still_learning_is_the_last_student() -> None:
    """A chain of students that have all converged has."""
    curve = [{"epoch": n + 1, "validation_accuracy": 1 - 0.5 ** (n + 1)} for n in range(40)]
    assert late_gain(curve * 3) == late_gain(curve) < 0.001


def test_late_gain_by_hand() -> None:
    rising = [{"epoch": epoch + 1, "validation_accuracy": epoch / 100} for epoch in range(100)]
    flat = [{"epoch": epoch + 1, "validation_accuracy": 0.9} for epoch in range(100)]
    seldom = [row | {"epoch": 2 * row["epoch"]} for row in rising]
    assert late_gain(rising) == pytest.approx(0.2)
    assert late_gain(flat) == pytest.approx(0)
    assert late_gain(rising[:2]) == 0
    assert late_gain([*flat, *seldom]) == late_gain(rising), "the last of several networks counts"
