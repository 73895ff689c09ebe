"""Keys with budgets: counted before an answer is given, by any number of threads and processes."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from undistill.core.errors import FileError, SpecError, StoreError
from undistill.serving.keys import ANYBODY, Keys, keys_of
from undistill.serving.refusals import Refusal


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.sqlite")


def images(count: int, first: int = 0) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in range(first, first + count)]


def test_without_keys_everybody_may_ask_and_is_counted(keys: Keys) -> None:
    assert keys.account(None) == ANYBODY
    keys.charge(ANYBODY, images(3))
    (account,) = keys.accounts(everybody=True)
    assert (account.billed, account.distinct, account.budget) == (3, 3, None)
    assert keys.accounts() == []


def test_with_a_key_in_the_file_nobody_asks_without_one(keys: Keys) -> None:
    token = keys.add("alice", 10)
    assert keys.account(token) == "alice"
    for wrong in (
        None,
        "",
        "x",
        token[:-1],
        token + "x",
        token.split(".")[0] + ".x",
        "." + token.split(".")[1],
        "\udcff",
    ):
        with pytest.raises(Refusal) as error:
            keys.account(wrong)
        assert error.value.status == 401


def test_only_hashes_of_keys_are_kept(keys: Keys) -> None:
    secret = keys.add("alice", 10).split(".")[1]
    held = b"".join(path.read_bytes() for path in keys.path.parent.glob("keys.sqlite*"))
    assert secret.encode() not in held
    assert keys.path.stat().st_mode & 0o077 == 0


def test_a_budget_is_spent_to_the_last_image_and_no_further(keys: Keys) -> None:
    keys.add("alice", 10)
    assert keys.charge("alice", images(8)).billed == 8
    with pytest.raises(Refusal, match="2 of 10 images are left, and 3 were asked") as error:
        keys.charge("alice", images(3))
    assert error.value.status == 403
    assert keys.charge("alice", images(2)).billed == 10
    assert keys.accounts()[0].left == 0


def test_all_keys_together_have_a_budget_too(keys: Keys) -> None:
    for name in ("alice", "bob"):
        keys.add(name, 10)
    keys.charge("alice", images(6), most_in_all=8)
    with pytest.raises(Refusal, match="all keys together"):
        keys.charge("bob", images(3), most_in_all=8)
    assert keys.charge("bob", images(2), most_in_all=8).billed_in_all == 8


def test_an_image_that_is_asked_again_is_billed_and_not_distinct(keys: Keys) -> None:
    for name in ("alice", "bob"):
        keys.add(name, None)
    keys.charge("alice", images(5))
    keys.charge("alice", [*images(3), *images(2, first=9), *images(1)])
    keys.charge("bob", images(1))
    assert [(one.name, one.billed, one.distinct) for one in keys.accounts()] == [("alice", 11, 7), ("bob", 1, 1)]


def test_what_was_not_answered_is_not_billed(keys: Keys) -> None:
    keys.add("alice", 5)
    keys.refund(keys.charge("alice", images(5)))
    assert (keys.accounts()[0].billed, keys.accounts()[0].distinct) == (0, 0)
    assert keys.charge("alice", images(5)).billed == 5
    assert (keys.accounts()[0].asked, keys.accounts()[0].unanswered) == (10, 5)


def test_a_key_ends_when_it_expires_or_is_revoked(keys: Keys) -> None:
    short, long = keys.add("short", 5, days=0.3 / 86_400), keys.add("long", 5, days=1)
    assert keys.account(short) == "short"
    time.sleep(0.35)
    with pytest.raises(Refusal, match="expired"):
        keys.account(short)
    with pytest.raises(Refusal, match="expired"):
        keys.charge("short", images(1))
    Keys(keys.path).revoke("long")  # by another process
    with pytest.raises(Refusal, match="revoked"):
        keys.account(long)
    assert {one.name: one.state for one in keys.accounts()} == {"short": "expired", "long": "revoked"}


def test_names_are_checked_and_taken_once(keys: Keys) -> None:
    keys.add("alice", 5)
    for name in ("alice", "", "a b", "../x", ANYBODY, "x" * 65):
        with pytest.raises(SpecError):
            keys.add(name, 5)
    with pytest.raises(SpecError, match="did you mean 'alice'"):
        keys.revoke("alise")


def test_threads_never_pass_a_budget_by_one_image(keys: Keys) -> None:
    keys.add("alice", 100)

    def ask(number: int) -> int:
        try:
            return keys.charge("alice", images(3, first=3 * number)).images
        except Refusal:
            return 0

    with ThreadPoolExecutor(8) as pool:
        counted = sum(pool.map(ask, range(60)))
    assert counted == keys.accounts()[0].billed == 99


def test_processes_share_a_budget(keys: Keys) -> None:
    keys.add("alice", 50)
    program = (
        "import sys; from pathlib import Path; from undistill.serving.keys import Keys, Refusal\n"
        "keys, found = Keys(Path(sys.argv[1])), 0\n"
        "for number in range(40):\n"
        "    try: found += keys.charge('alice', [bytes([number])]).images\n"
        "    except Refusal: pass\n"
        "print(found)"
    )
    command = [sys.executable, "-c", program, str(keys.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sum(int(process.communicate()[0]) for process in processes) == keys.accounts()[0].billed == 50


def test_a_damaged_file_of_keys_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "keys.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="restore it"):
        Keys(tmp_path / "keys.sqlite").add("alice", 5)


def test_keys_of_a_model_lie_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert keys_of(tmp_path / "run").path == tmp_path / "run-serve" / "keys.sqlite"
    (tmp_path / "gateway").mkdir()
    assert keys_of(tmp_path / "gateway").path == tmp_path / "gateway" / "keys.sqlite"
    with pytest.raises(StoreError, match="no folder"):
        keys_of(tmp_path / "nothing")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "report.json").write_text("{}")
    with pytest.raises(StoreError, match=r"it holds report\.json"):
        keys_of(tmp_path / "audit")


def test_who_was_let_in_without_a_key_is_asked_for_one_once_there_are_keys(keys: Keys) -> None:
    name = keys.account(None)
    keys.add("alice", 5)
    with pytest.raises(Refusal, match="A key is needed"):
        keys.charge(name, images(1))


def test_a_link_in_the_place_of_the_file_is_refused(keys: Keys, tmp_path: Path) -> None:
    keys.add("alice", 5)
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "keys.sqlite").symlink_to(keys.path)
    with pytest.raises(FileError, match="is a link"):
        Keys(tmp_path / "stranger" / "keys.sqlite").account(None)
