import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from tests.conftest import RECIPE, STUDENT, TEACHER
from undistill.api.audits import audit, plan_audit
from undistill.auditing.cell import Job
from undistill.auditing.pair import VictimPair
from undistill.auditing.plan import Plan
from undistill.auditing.schema import Report
from undistill.auditing.suites import Tuning
from undistill.auditing.tuning import Search
from undistill.core.errors import ModelError, SpecError, StoreError
from undistill.core.files import seal
from undistill.runs.run import Run
from undistill.runs.settings import TrainSettings
from undistill.runs.train import train
from undistill.victims.oracle import Oracle

ROOT = Path(__file__).parents[1]


def run_audit(victim: Run, out: Path, **options: object) -> Report:
    return audit(victim, out, students=[STUDENT], device="cpu", **({"seeds": 2} | options))  # type: ignore[arg-type]


def test_every_cell_is_there(report: Report, toy) -> None:
    found = {(cell.side, cell.attack.split("(")[0], cell.seed) for cell in report.cells}
    assert found == {
        (side, attack, seed)
        for seed in (0, 1)
        for side, attack in [
            ("none", "Scratch"),
            ("none", "LabelSmoothing"),
            ("victim", "SoftLabels"),
            ("honest", "SoftLabels"),
            ("victim", "HardLabels"),
            ("honest", "HardLabels"),
        ]
    }
    views = RECIPE.epochs * len(toy.attackers(0.1, 0).train)
    assert {cell.queries for cell in report.cells if cell.side == "none"} == {0}
    assert {cell.queries for cell in report.cells if cell.side != "none"} == {views}
    assert report.divergence > 1
    assert report.pairs[0].test_images == len(toy.test)


def test_report_json_keeps_its_schema(folder: Path) -> None:
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert schema == Report.model_json_schema(), "run: make schema"
    jsonschema.validate(json.loads((folder / "report.json").read_text()), schema)


def test_a_repeated_audit_trains_nothing(victim: Run, folder: Path, report: Report, monkeypatch) -> None:
    monkeypatch.setattr(Job, "_attack", lambda *_: pytest.fail("a finished cell was trained again"))
    again = run_audit(victim, folder)
    assert again.cells == report.cells
    assert again.verdict == report.verdict


@pytest.mark.parametrize(
    "edit",
    [
        lambda cell: cell | {"accuracy": 0.99},
        lambda cell: seal({name: value for name, value in cell.items() if name != "sha256"} | {"accuracy": 7.0}),
        lambda cell: seal({name: value for name, value in cell.items() if name != "sha256"} | {"seed": 5}),
        lambda cell: {},
        None,
    ],
    ids=["by hand", "range", "another's", "empty", "cut"],
)
def test_a_damaged_or_edited_cell_is_done_again(edit, victim: Run, folder: Path, tmp_path: Path, caplog) -> None:
    """By hand, or with a new hash and impossible content."""
    folder = shutil.copytree(folder, tmp_path / "copy")
    damaged = next((folder / "cells").glob("*.json"))
    whole = json.loads(damaged.read_text())
    damaged.write_text(json.dumps(edit(whole)) if edit else damaged.read_text()[:60])
    run_audit(victim, folder)
    assert "is damaged or was edited; that cell is done again" in caplog.text
    varies = {"seconds": 0, "sha256": 0}
    assert {**json.loads(damaged.read_text()), **varies} == {**whole, **varies}


def test_more_seeds_reuse_the_old_cells(victim: Run, folder: Path, report: Report, monkeypatch) -> None:
    trained = []
    train_cell = Job._attack
    monkeypatch.setattr(Job, "_attack", lambda job, *rest: trained.append(job.seed) or train_cell(job, *rest))
    more = run_audit(victim, folder, seeds=3)
    assert set(trained) == {2}, "trials are there, too"
    assert more.cells[: len(report.cells)] == report.cells


def test_a_stopped_audit_ends_with_the_same_cells(victim: Run, report: Report, tmp_path: Path, monkeypatch) -> None:
    asked = 0
    ask = Oracle.__call__

    def stops(oracle: Oracle, batch):
        nonlocal asked
        asked += 1
        if asked == 40:
            raise KeyboardInterrupt
        return ask(oracle, batch)

    monkeypatch.setattr("undistill.training.loop.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(Oracle, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        run_audit(victim, tmp_path / "a")
    assert list((tmp_path / "a" / "cells").glob("*/checkpoint-0.pt"))
    monkeypatch.setattr(Oracle, "__call__", ask)
    resumed = run_audit(victim, tmp_path / "a")
    drop = {"seconds"}
    assert [c.model_dump(exclude=drop) for c in resumed.cells] == [c.model_dump(exclude=drop) for c in report.cells]
    assert not list((tmp_path / "a" / "cells").glob("*/"))


def test_a_finished_audit_writes_the_same_report_again(victim: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a")

    def written() -> list[bytes]:
        run_audit(victim, tmp_path / "a")
        return [(tmp_path / "a" / name).read_bytes() for name in ("report.json", "report.html", "report.md")]

    assert written() == written()


def test_an_audit_against_the_wrong_twin_is_refused(victim: Run, tmp_path: Path) -> None:
    other = train(
        "digits", TEACHER, tmp_path / "digits", settings=TrainSettings(recipe=RECIPE.model_copy(update={"epochs": 0}))
    )
    with pytest.raises(StoreError, match="on different data"):
        audit(victim, tmp_path / "a", honest=other)
    with pytest.raises(StoreError, match="name it with --honest"):
        audit(other, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_replaced_twin_is_noticed(victim: Run, tmp_path: Path, toy_file: Path) -> None:
    moved = Path(shutil.copytree(victim.folder, tmp_path / "victim"))
    other = TrainSettings(recipe=RECIPE.model_copy(update={"epochs": 0}))
    train(str(toy_file), TEACHER, tmp_path / "honest", settings=other, device="cpu")
    assert json.loads((moved / "run.json").read_text())["parent"]["folder"] == "../honest"
    with pytest.raises(StoreError, match=r"honest twin of .* is no longer at"):
        run_audit(Run.open(moved), tmp_path / "a")


def test_an_attack_that_cannot_be_tried_is_named_before_anything_is_trained(
    victim: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("undistill.attacks.data_free.deep_inversion.batch_norms", lambda network: [])
    with pytest.raises(ModelError, match=r"the victim has none\. It can do without"):
        run_audit(victim, tmp_path / "audit", attacks=["DeepInversion()"])
    assert not (tmp_path / "audit").exists()


def test_unknown_parts_are_named(victim: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'quick-2'"):
        run_audit(victim, tmp_path / "a", suite="quik")
    with pytest.raises(SpecError, match="did you mean 'SoftLabels'"):
        run_audit(victim, tmp_path / "a", attacks=["SoftLabel"])
    assert not (tmp_path / "a").exists()


NEWCOMER = '''
from collections.abc import Mapping
from pydantic import Field
from torch import Tensor, nn
from undistill import Access, Attack, Batch, Fit, Fresh, Oracle, Split, tries


class LogitMatching(Attack):
    """Mean squared error between log-probabilities."""

    needs = Access.QUERY
    space = tries(scale=(0.1, 0.2, 0.4))
    scale: float = Field(0.1, gt=0)

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        assert not hasattr(data, "test")

        def objective(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            error = network(batch.images).log_softmax(1) - oracle(batch).log_p
            return {"match": self.scale * error.square().mean()}

        return fit(fresh(), data, objective)
'''


def test_a_newcomers_attack_is_one_file(victim: Run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    from undistill.attacks import Attack

    monkeypatch.setattr(Attack, "registry", dict(Attack.registry))
    file = tmp_path / "logit_matching.py"
    file.write_text(NEWCOMER)
    text = f"{file}:LogitMatching(scale=0.2)"
    report = run_audit(victim, folder, seeds=1, attacks=[text])
    rows = [cell for cell in report.cells if cell.attack == text]
    assert {cell.side for cell in rows} == {"victim", "honest"}
    assert rows[0].queries > 0
    plan = plan_audit(victim, attacks=[text], students=[STUDENT], seeds=1, device="cpu")
    search = Search.of(next(job for job in plan.searched if str(job.attack) == text), Tuning(trials=16))
    assert {job.attack.scale for job in search.ask()} > {0.2}, "its search space is searched"
    assert Attack.parse(text) == Attack.parse(str(Attack.parse(text)))
    done = set((folder / "cells").glob("*.json"))
    file.write_text(NEWCOMER + "# a comment\n")
    run_audit(victim, folder, seeds=1, attacks=[text])
    assert set((folder / "cells").glob("*.json")) == done
    file.write_text(NEWCOMER.replace("square()", "abs()"))
    run_audit(victim, folder, seeds=1, attacks=[text])
    assert len(set((folder / "cells").glob("*.json")) - done) == 4, "changed code is another attack"


def test_an_edited_attack_of_this_package_is_another_attack(victim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (job, *_) = Plan.of([VictimPair.of(victim, None, [0], None)], "quick-2", (), [STUDENT], RECIPE).jobs
    before = job.key
    monkeypatch.setattr("undistill.auditing.cell.source_sha256", lambda kind: f"edited {kind.__name__}")
    assert job.key != before


def test_an_audit_needs_a_seed(victim: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="takes 1 to 1000 seeds"):
        run_audit(victim, tmp_path / "a", seeds=0)


def test_what_makes_a_twin_doubtful_is_recorded(honest: Run, victim: Run, toy_file: Path, tmp_path: Path) -> None:
    adopt = TrainSettings(recipe=RECIPE.model_copy(update={"epochs": 0}))
    weights = victim.folder / "weights.safetensors"
    other = train(str(toy_file), TEACHER, tmp_path / "other", weights=weights, settings=adopt, device="cpu")
    report = run_audit(victim, tmp_path / "a", honest=other.folder, seeds=1, recipe=RECIPE)
    assert report.pairs[0].agreement == 1, "the twin is the victim itself"
    assert {"adopted_weights", "another_twin"} <= {flag.name for flag in report.flags}


UNFINISHED = """
from undistill import Access, Attack


class NoRun(Attack):
    needs = Access.QUERY


class NoResult(Attack):
    def run(self, oracle, fresh, data, fit):
        return None


class SoftLabels(Attack):
    def run(self, oracle, fresh, data, fit):
        return fresh()
"""


def test_unfinished_attacks_are_explained(victim: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(UNFINISHED)
    with pytest.raises(SpecError, match="NoRun lacks run"):
        run_audit(victim, folder, attacks=[f"{tmp_path / 'mine.py'}:NoRun"])
    with pytest.raises(ModelError, match="returned NoneType; it must return the network"):
        run_audit(victim, folder, attacks=[f"{tmp_path / 'mine.py'}:NoResult"])


def test_an_attack_of_the_users_does_not_replace_one_of_ours(tmp_path: Path) -> None:
    from undistill.attacks import Attack

    ours = type(Attack.parse("SoftLabels"))
    (tmp_path / "mine.py").write_text(UNFINISHED)
    assert type(Attack.from_user(f"{tmp_path / 'mine.py'}:SoftLabels")) is not ours
    assert type(Attack.parse("SoftLabels")) is ours


NEW_DEFENCE = '''
from undistill import Defence


class Nothing(Defence):
    """Leave the teacher as it is."""

    def protect(self, current, honest, fresh, data, fit):
        assert not hasattr(data, "test")
        return current
'''


def test_a_newcomers_defence_is_one_file(honest: Run, tmp_path: Path, monkeypatch) -> None:
    from undistill.defences import Defence
    from undistill.runs.protect import protect

    monkeypatch.setattr(Defence, "registry", dict(Defence.registry))
    (tmp_path / "nothing.py").write_text(NEW_DEFENCE)
    run = protect(honest, f"{tmp_path / 'nothing.py'}:Nothing", tmp_path / "same", device="cpu")
    assert run.digest == honest.digest
    report = run_audit(run, tmp_path / "audit", seeds=1)
    assert report.verdict.damage.mean == 0
    assert "barely_diverged" in {flag.name for flag in report.flags}


def test_a_file_dropped_into_the_folder_is_found(tmp_path: Path, monkeypatch) -> None:
    """`undistill/attacks/` imports whatever lies in it; nothing is listed anywhere."""
    import sys

    from undistill import attacks
    from undistill.attacks import Attack
    from undistill.cli.catalogue import catalogue
    from undistill.core.discover import import_all

    monkeypatch.setattr(Attack, "registry", dict(Attack.registry))
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path)])
    (tmp_path / "newcomer.py").write_text(NEWCOMER)
    import_all(attacks.__path__, "undistill.attacks")
    monkeypatch.delitem(sys.modules, "undistill.attacks.newcomer")
    assert str(Attack.parse("LogitMatching")) == "LogitMatching(scale=0.1)"
    assert "LogitMatching" in {row["name"] for row in catalogue("attacks")["attacks"]}
