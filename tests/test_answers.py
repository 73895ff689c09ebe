"""Remembered answers: the same bits, asked once, trusted only if whole and of this very network."""

import errno
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import undistill
from undistill.core import files
from undistill.data import Data
from undistill.data.batches import Batch, ViewDataset
from undistill.data.views import Views, to_float
from undistill.models import Model
from undistill.training import answers as remembered
from undistill.training.answers import AnswerStore, RememberedAnswers, _digest
from undistill.training.compute import FAST, Compute
from undistill.training.metrics import evaluate

BF16 = Compute(precision="bf16")


@pytest.fixture
def victim() -> nn.Module:
    return Model.parse("ConvNet(width=4)").build((1, 12, 12), 3, seed=1).eval()


@pytest.fixture
def stream(toy: Data) -> ViewDataset:
    return ViewDataset(toy.train, Views(), 7, toy.num_classes)


def batch_of(stream: ViewDataset, epoch: int, index: Tensor) -> Batch:
    images, labels = stream.show(epoch, index)
    return Batch.of(stream, epoch, index, to_float(images), labels)


def everything(stream: ViewDataset) -> Tensor:
    return torch.arange(len(stream.samples))


@pytest.mark.parametrize("compute", [Compute(), BF16], ids=str)
def test_an_answer_is_the_network_s_own(victim: nn.Module, stream: ViewDataset, compute: Compute) -> None:
    batch = batch_of(stream, 0, everything(stream))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=compute == BF16):
        own = victim(batch.images)
    assert torch.allclose(RememberedAnswers(victim, compute)(batch).float(), own.float(), atol=1e-6)


@pytest.mark.parametrize("compute", [Compute(), BF16], ids=str)
def test_answers_are_the_same_bits_in_every_batch_and_order(
    victim: nn.Module, stream: ViewDataset, compute: Compute, tmp_path: Path
) -> None:
    whole = RememberedAnswers(victim, compute)(batch_of(stream, 3, everything(stream)))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    for store in (AnswerStore(), AnswerStore(tmp_path)):
        asked = RememberedAnswers(deepcopy(victim), compute, store)
        for index in order.split(17):
            assert torch.equal(asked(batch_of(stream, 3, index)), whole[index])


def test_each_view_is_answered_once(victim: nn.Module, stream: ViewDataset) -> None:
    answers = RememberedAnswers(victim)
    for _ in range(3):
        for epoch in range(2):
            for index in everything(stream).split(10):
                answers(batch_of(stream, epoch, index))
    assert answers.computed == 2 * len(stream.samples)


def test_n_views_bounds_what_is_answered(victim: nn.Module, toy: Data) -> None:
    answers = RememberedAnswers(victim)
    stream = ViewDataset(toy.train, Views(n_views=3), 7, toy.num_classes)
    for epoch in range(10):
        answers(batch_of(stream, epoch, everything(stream)))
    assert answers.computed == 3 * len(stream.samples)


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: Batch(batch.images.flip(3), batch.labels, batch.index, batch.epoch, batch.origin),
        lambda batch: batch.images.mul_(0.5) is None or batch,
    ],
    ids=["replaced", "changed"],
)
def test_images_that_are_no_longer_the_view_are_computed(
    victim: nn.Module, stream: ViewDataset, change: Callable[[Batch], Batch]
) -> None:
    """An attack may perturb its images; it must not get the answer to those that it started from."""
    answers = RememberedAnswers(victim)
    batch = change(batch_of(stream, 0, torch.arange(8)))
    with torch.no_grad():
        assert torch.equal(answers(batch), victim(batch.images))
    assert answers.computed == 8


def test_later_commands_find_them(victim: nn.Module, stream: ViewDataset, tmp_path: Path) -> None:
    first = RememberedAnswers(victim, store=AnswerStore(tmp_path)).epoch(stream, 0)
    later = RememberedAnswers(deepcopy(victim), store=AnswerStore(tmp_path))
    assert torch.equal(later.epoch(stream, 0), first)
    assert later.computed == 0


def test_answers_held_in_memory_are_bounded(victim: nn.Module, stream: ViewDataset, monkeypatch) -> None:
    answers = RememberedAnswers(victim)
    size = answers.epoch(stream, 0).nbytes
    monkeypatch.setattr("undistill.training.answers.HELD", 2 * size)
    for epoch in range(1, 9):
        answers.epoch(stream, epoch)
    assert len(answers._held) == 2


def other_weights(victim: nn.Module, stream: ViewDataset) -> tuple[nn.Module, ViewDataset, Compute]:
    changed = deepcopy(victim)
    next(changed.parameters()).data.flatten()[0] += 1e-6
    return changed, stream, Compute()


def other_buffers(victim: nn.Module, stream: ViewDataset) -> tuple[nn.Module, ViewDataset, Compute]:
    changed = deepcopy(victim)
    next(iter(changed.buffers())).flatten()[0] += 1e-6
    return changed, stream, Compute()


def other_code(victim: nn.Module, stream: ViewDataset) -> tuple[nn.Module, ViewDataset, Compute]:
    return nn.Sequential(victim), stream, Compute()


def other_data(victim: nn.Module, stream: ViewDataset) -> tuple[nn.Module, ViewDataset, Compute]:
    return victim, ViewDataset(stream.samples[torch.arange(50)], stream.views, stream.seed, 3), Compute()


def other_views(victim: nn.Module, stream: ViewDataset) -> tuple[nn.Module, ViewDataset, Compute]:
    return victim, ViewDataset(stream.samples, Views(flip=True), stream.seed, 3), Compute()


def other_seed(victim: nn.Module, stream: ViewDataset) -> tuple[nn.Module, ViewDataset, Compute]:
    return victim, ViewDataset(stream.samples, stream.views, 8, 3), Compute()


def other_engine(victim: nn.Module, stream: ViewDataset) -> tuple[nn.Module, ViewDataset, Compute]:
    return victim, stream, BF16


def other_version(victim: nn.Module, stream: ViewDataset) -> tuple[nn.Module, ViewDataset, Compute]:
    undistill.__version__ += "+changed"
    return victim, stream, Compute()


@pytest.mark.parametrize(
    "other",
    [other_weights, other_buffers, other_code, other_data, other_views, other_seed, other_engine, other_version],
)
def test_nothing_is_mistaken_for_something_else(
    other, victim: nn.Module, stream: ViewDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undistill, "__version__", undistill.__version__)
    RememberedAnswers(victim, store=AnswerStore(tmp_path)).epoch(stream, 0)
    network, stream, compute = other(victim, stream)
    answers = RememberedAnswers(network, compute, AnswerStore(tmp_path))
    answers.epoch(stream, 0)
    assert answers.computed == len(stream.samples)


class Scaled(nn.Module):
    """A network that depends on state outside its state dict."""

    def __init__(self, victim: nn.Module, k: float, mean: float) -> None:
        super().__init__()
        self.victim, self.k = victim, k
        self.register_buffer("mean", torch.tensor(mean), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.k * self.victim(x - self.mean)


@pytest.mark.parametrize("other", [(2.0, 0.0), (1.0, 0.5)], ids=["attribute", "buffer that is not saved"])
def test_what_no_state_dict_holds_is_noticed(
    other: tuple[float, float], victim: nn.Module, stream: ViewDataset, tmp_path: Path
) -> None:
    RememberedAnswers(Scaled(deepcopy(victim), 1, 0), store=AnswerStore(tmp_path)).epoch(stream, 0)
    answers = RememberedAnswers(Scaled(deepcopy(victim), *other), store=AnswerStore(tmp_path))
    answers.epoch(stream, 0)
    assert answers.computed == len(stream.samples)


def test_code_in_no_file_is_asked_again(stream: ViewDataset, tmp_path: Path) -> None:
    """Its behaviour cannot be named, so nothing could tell a later change."""
    scope: dict[str, type[nn.Module]] = {"Flatten": nn.Flatten}  # type: ignore[dict-item]
    exec("class Typed(Flatten):\n    pass", scope)
    network = nn.Sequential(scope["Typed"](), nn.Linear(144, 3))
    RememberedAnswers(network, store=AnswerStore(tmp_path)).epoch(stream, 0)
    assert not list(tmp_path.iterdir())


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def one_bit_changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def foreign(file: Path) -> None:
    save_file({"answers": load_file(file)["answers"] + 1}, file, {"key": "of another network"})


def of_other_weights(file: Path) -> None:
    answers = load_file(file)["answers"] + 1
    save_file({"answers": answers}, file, {"key": "of another network", "epoch": "0", "sha256": _digest(answers)})


def of_another_epoch(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file(load_file(file), file, about | {"epoch": "1"})


@pytest.mark.parametrize("damage", [truncated, emptied, one_bit_changed, foreign, of_other_weights, of_another_epoch])
def test_damaged_and_foreign_files_are_rebuilt(
    damage, victim: nn.Module, stream: ViewDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = RememberedAnswers(victim, store=AnswerStore(tmp_path)).epoch(stream, 0)
    file = next(tmp_path.glob("*/*.safetensors"))
    damage(file)
    answers = RememberedAnswers(victim, store=AnswerStore(tmp_path))
    assert torch.equal(answers.epoch(stream, 0), whole)
    assert answers.computed == len(whole)
    assert str(file) in caplog.text
    assert torch.equal(load_file(file)["answers"], whole), "the file was written anew"


def full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AnswerStore:
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse)
    return AnswerStore(folder)


def no_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AnswerStore:
    """`/proc` refuses folders even to root."""
    return AnswerStore(Path("/proc/undistill"))


def unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AnswerStore:
    """As a folder of another user, into which one may not look."""
    exists, mine = Path.exists, folder / "answers"

    def refuse(path: Path) -> bool:
        if mine in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    return AnswerStore(mine)


def a_file_in_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AnswerStore:
    (folder / "answers").touch()
    return AnswerStore(folder / "answers")


def small_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AnswerStore:
    return AnswerStore(folder, limit=4000)


@pytest.mark.parametrize("trouble", [full_disk, no_permission, unreadable, a_file_in_its_place, small_limit])
def test_trouble_with_the_disk_costs_one_warning(
    trouble, victim: nn.Module, stream: ViewDataset, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = RememberedAnswers(victim)
    answers = RememberedAnswers(victim, store=trouble(tmp_path, monkeypatch))
    for epoch in range(4):
        assert torch.equal(answers.epoch(stream, epoch), expected.epoch(stream, epoch))
    assert len(caplog.records) == 1
    assert "The work goes on and asks again" in caplog.text
    assert not list(tmp_path.rglob("*.part"))


def test_the_limit_counts_what_was_there_before(victim: nn.Module, stream: ViewDataset, tmp_path: Path) -> None:
    RememberedAnswers(victim, store=AnswerStore(tmp_path)).epoch(stream, 0)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    answers = RememberedAnswers(victim, store=AnswerStore(tmp_path, limit=size + 10))
    answers.epoch(stream, 1)
    assert answers.computed == len(stream.samples)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_past_the_limit_what_is_there_is_still_found(victim: nn.Module, stream: ViewDataset, tmp_path: Path) -> None:
    RememberedAnswers(victim, store=AnswerStore(tmp_path)).epoch(stream, 0)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    answers = RememberedAnswers(victim, store=AnswerStore(tmp_path, limit=size + 10))
    answers.epoch(stream, 1)
    answers._held.clear()
    answers.epoch(stream, 0)
    assert answers.computed == len(stream.samples)


def test_zero_keeps_nothing(victim: nn.Module, stream: ViewDataset, tmp_path: Path) -> None:
    answers = RememberedAnswers(victim, store=AnswerStore(tmp_path / "answers", limit=0))
    for _student in range(2):
        for epoch in range(3):
            answers.epoch(stream, epoch)
    assert answers.computed == 6 * len(stream.samples), "each student asks for itself"
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_store_does_not_stop_a_trial(
    victim: nn.Module, stream: ViewDataset, tmp_path: Path
) -> None:
    (tmp_path / "answers").touch()
    answers = RememberedAnswers(victim, FAST, AnswerStore(tmp_path / "answers"))
    assert len(answers.epoch(stream, 0)) == len(stream.samples)


def test_what_is_measured_is_computed_in_fp32_whatever_the_engine(victim: nn.Module, toy: Data) -> None:
    fast, exact = (RememberedAnswers(victim, compute).plain(toy.test, toy.num_classes) for compute in (BF16, Compute()))
    assert torch.equal(fast, exact)
    assert torch.equal(exact, evaluate(victim, toy.test))


@pytest.mark.parametrize(("compute", "width"), [(Compute(), 4), (BF16, 2)], ids=["fp32", "bf16"])
def test_the_size_of_the_store_is_its_formula(
    compute: Compute, width: int, victim: nn.Module, stream: ViewDataset, tmp_path: Path
) -> None:
    """N K (4 or 2) bytes for each epoch, and a header below 400."""
    answers = RememberedAnswers(victim, compute, AnswerStore(tmp_path))
    for epoch in range(3):
        answers.epoch(stream, epoch)
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.safetensors")]
    assert len(sizes) == 3
    assert all(0 < size - len(stream.samples) * 3 * width < 400 for size in sizes)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what is mapped")
def test_kept_answers_are_mapped_not_read(victim: nn.Module, stream: ViewDataset, tmp_path: Path) -> None:
    RememberedAnswers(victim, store=AnswerStore(tmp_path)).epoch(stream, 0)
    later = RememberedAnswers(victim, store=AnswerStore(tmp_path))
    assert len(later.epoch(stream, 0)) == len(stream.samples)
    assert str(next(tmp_path.glob("*/*.safetensors"))) in Path("/proc/self/maps").read_text()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven images are answered together, and as many make a block."""
    monkeypatch.setattr(remembered, "PART", 7)
    monkeypatch.setattr(remembered, "LEAST", 7)


def test_blocks_are_the_epoch_and_a_damaged_one_alone_is_made_again(
    victim: nn.Module, stream: ViewDataset, tmp_path: Path, small_blocks: None
) -> None:
    whole = RememberedAnswers(victim, store=AnswerStore(limit=0)).epoch(stream, 0)
    assert torch.equal(RememberedAnswers(victim, store=AnswerStore(tmp_path)).epoch(stream, 0), whole)
    blocks = sorted(tmp_path.glob("*/*/00000.safetensors"))
    assert 1 < len(blocks) <= remembered.BLOCKS
    blocks[1].write_bytes(blocks[0].read_bytes())  # whole, but of other images
    again = RememberedAnswers(victim, store=AnswerStore(tmp_path))
    assert torch.equal(again.epoch(stream, 0), whole)
    assert 0 < again.computed < len(whole)


def test_processes_share_the_work_of_an_epoch(
    victim: nn.Module, stream: ViewDataset, tmp_path: Path, small_blocks: None
) -> None:
    """While one makes a block, another makes those after it; both get the whole."""
    expected = RememberedAnswers(victim, store=AnswerStore(limit=0)).epoch(stream, 0)
    one, other = (RememberedAnswers(deepcopy(victim), store=AnswerStore(tmp_path)) for _ in range(2))
    made, make = list[Tensor](), one._make

    def slow(*work: Any) -> Tensor:
        if not made:
            thread.start()
            time.sleep(0.3)
        return make(*work)

    thread = threading.Thread(target=lambda: made.append(other.epoch(stream, 0)))
    one._make = slow  # type: ignore[method-assign]
    assert torch.equal(one.epoch(stream, 0), expected)
    thread.join()
    assert torch.equal(made[0], expected)
    assert one.computed + other.computed == len(expected), "nothing twice"
    assert min(one.computed, other.computed) > 0
