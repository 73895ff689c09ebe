"""Networks and checkpoints as people have them: each kind works, or gets a sentence that names the cause."""

import logging
import re
from argparse import Namespace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from undistill.api import audit
from undistill.auditing.pair import VictimPair
from undistill.core.errors import ModelError, remark
from undistill.data.batches import Batch, ViewDataset
from undistill.data.views import Views, to_float
from undistill.defences.responses.top_k import TopK
from undistill.models import Model
from undistill.models.adapter import Adapter
from undistill.models.trial import varies
from undistill.models.weights import load_weights, read_state
from undistill.runs.protect import protect
from undistill.runs.run import Run
from undistill.runs.settings import Settings, TrainSettings
from undistill.runs.train import train
from undistill.training.metrics import accuracy, self_agreement
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Access, Oracle

SHAPE = (1, 8, 8)
SOFT = """
def soft():
    return nn.Sequential(base(), nn.Softmax(1))
"""
NETS = """
import numpy as np, torch
from torch import nn

def base():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 3))

class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = base(), 0
    def forward(self, x): return self.net(x)
    def get_extra_state(self): return {"seen": self.seen}
    def set_extra_state(self, state): self.seen = state["seen"]

class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = base()
    def forward(self, x): return self.net(x.sub_(0.5).div_(0.25))

class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = base()
        self.register_buffer("seen", torch.zeros(()))
    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.net(x)

class Keeps(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.shift = how, 0.0
        fixed = torch.randn(64, 32)
        if how == "attribute": self.fixed = fixed
        if how == "non-persistent": self.register_buffer("fixed", fixed, persistent=False)
        if how == "buffer": self.register_buffer("fixed", fixed)
        if how == "permutation": self.order = torch.randperm(64).tolist()
        self.fc = nn.Linear(64 if how in ("permutation", "statistic") else 32, 3)
    def forward(self, x):
        x = x.flatten(1)
        if self.how == "permutation": return self.fc(x[:, self.order])
        if self.how == "statistic":
            if self.training: self.shift = 0.9 * self.shift + 0.1 * float(x.mean())
            return self.fc((x > self.shift).float())
        return self.fc((x @ self.fixed).relu())

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = base()
    def forward(self, x): return self.net(x + torch.rand_like(x))

class Late(nn.Module):
    'Changes outside of its state dict, and late: a trial before training cannot see it.'
    def __init__(self):
        super().__init__()
        self.net, self.factor, self.steps = base(), 1.0, 0
    def forward(self, x):
        if self.training:
            self.steps += 1
            if self.steps > 3: self.factor = -1.0
        return self.net(x) * self.factor

class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = base()
    def forward(self, x): return self.net(torch.from_numpy(x.numpy()))

def extra_state(): return Extra()
def in_place(): return InPlace()
def counts(): return Counts()
def scripted(): return torch.jit.script(base())
def traced(): return torch.jit.trace(base(), torch.rand(2, 1, 8, 8))
def lazy(): return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
def keeps(how): return Keeps(how)
def noisy(): return Noisy()
def late(): return Late()
def no_gradient(): return NoGradient()
def new_weight_norm():
    net = base(); net[0] = nn.utils.parametrizations.weight_norm(net[0]); return net
def weight_norm():
    net = base(); net[0] = nn.utils.weight_norm(net[0]); return net
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    """A module of networks, and data.npz beside it."""
    (tmp_path / "net.py").write_text(NETS)
    images = np.random.default_rng(0).integers(0, 255, (90, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.repeat(np.arange(3), 30))
    return tmp_path


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    remark.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def trained(nets: Path, factory: str) -> Run:
    settings = TrainSettings(recipe=Recipe(epochs=2, batch_size=16))
    return train(str(nets / "data.npz"), f"{nets / 'net.py'}:{factory}", nets / "run", settings=settings, device="cpu")


@pytest.mark.parametrize("factory", ["lazy()", "counts()", "new_weight_norm()", "keeps(how='buffer')", "noisy()"])
def test_networks_that_work(factory: str, nets: Path) -> None:
    run = trained(nets, factory)
    assert run.network(Model.from_user(f"{nets / 'net.py'}:{factory}"))(torch.rand(2, *SHAPE)).shape == (2, 3)


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        ("extra_state()", r"keeps extra state outside of tensors \(get_extra_state returns dict\).*register_buffer"),
        ("in_place()", r"changes the images that it is given, in place.*x = x - mean"),
        ("scripted()", "TorchScript module.*Return the nn.Module from which it was made"),
        ("traced()", "TorchScript module"),
        ("weight_norm()", "0 uses torch.nn.utils.weight_norm.*parametrizations.weight_norm"),
        ("no_gradient()", "has no gradient with respect to its images"),
        ("keeps(how='attribute')", r"outside of its weights \(such as fixed.*register_buffer"),
        ("keeps(how='non-persistent')", r"outside of its weights \(such as fixed"),
        ("keeps(how='permutation')", "outside of its weights"),
        ("keeps(how='statistic')", r"outside of its weights \(such as shift\)"),
        ("late()", "was stored, read again, and answers otherwise than what was measured"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_networks_that_cannot_be_used_are_explained(factory: str, why: str, nets: Path) -> None:
    with pytest.raises(ModelError, match=why):
        trained(nets, factory)
    assert not (nets / "run" / "run.json").exists()


def test_answers_that_vary_are_recognised(nets: Path) -> None:
    def network(name: str) -> nn.Module:
        return Model.from_user(f"{nets / 'net.py'}:{name}").build(SHAPE, 3, 0)

    assert varies(network("noisy()"), SHAPE)
    assert not varies(network("base()"), SHAPE)


def test_answers_that_vary_are_asked_anew_and_flagged(nets: Path) -> None:
    run, name = trained(nets, "noisy()"), f"{nets / 'net.py'}:noisy()"
    pair = VictimPair.of(run, run, [0], Model.from_user(name))
    victim = pair.victims["victim"]
    assert not victim.repeatable
    dataset = ViewDataset(pair.data.train, Views(), 0, 3)
    index = torch.arange(4)
    views, labels = dataset.show(0, index)
    batch = Batch.of(dataset, 0, index, to_float(views), labels)
    assert not torch.equal(victim.answer_views(batch).log_p, victim.answer_views(batch).log_p)
    report = audit(
        run,
        nets / "audit",
        honest=run,
        model=name,
        students=["ConvNet(width=2)"],
        seeds=1,
        recipe=Recipe(epochs=1),
        device="cpu",
    )
    said = {flag.name: flag.message for flag in report.flags}
    asked = pair.asked("victim")
    assert len(asked) == 5
    assert not torch.equal(asked[0], asked[1])
    assert report.pairs[0].self_agreement == self_agreement(asked)
    assert f"asked 5 times, it kept its top answer for {self_agreement(asked):.1%}" in said["answers_vary"]
    assert report.victim.accuracy == pytest.approx(fmean(accuracy(one, pair.data.test.labels) for one in asked))
    assert torch.allclose(pair.test_logits("victim").exp(), torch.stack([one.softmax(1) for one in asked]).mean(0))
    assert not list((run.folder / "answers").glob("*/*"))


def test_answers_that_vary_are_recognised_behind_a_response(nets: Path) -> None:
    noisy = Model.from_user(f"{nets / 'net.py'}:noisy()").build(SHAPE, 3, 0).eval()
    still = Model.from_user(f"{nets / 'net.py'}:base()").build(SHAPE, 3, 0).eval()
    assert varies(TopK(k=2).wrap(noisy, SHAPE, 3), SHAPE)
    assert not varies(TopK(k=2).wrap(still, SHAPE, 3), SHAPE)


def test_a_reference_whose_answers_vary_is_never_remembered(nets: Path) -> None:
    run, name = trained(nets, "noisy()"), f"{nets / 'net.py'}:noisy()"
    short = Settings(recipe=Recipe(epochs=2, batch_size=16))
    protect(run, "Nasty(omega=0.01)", nets / "nasty", model=name, settings=short, device="cpu")
    assert not list((run.folder / "answers").glob("*/*"))


def test_a_network_with_a_softmax_is_not_trained(nets: Path) -> None:
    (nets / "net.py").write_text((nets / "net.py").read_text() + SOFT)
    with pytest.raises(ModelError, match=r"soft ends with a softmax.*returns logits"):
        trained(nets, "soft")


def test_code_and_weights_are_read_before_images(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.py"):
        train(str(tmp_path / "no-images"), "nowhere.py:make", tmp_path / "run")
    with pytest.raises(ModelError, match="There is no weights file"):
        train(str(tmp_path / "no-images"), "ConvNet(width=2)", tmp_path / "run", weights=tmp_path / "nowhere.pt")


def test_what_a_thief_bought_of_a_varying_victim_is_one_answer(nets: Path) -> None:
    run, name = trained(nets, "noisy()"), f"{nets / 'net.py'}:noisy()"
    pair = VictimPair.of(run, run, [0], Model.from_user(name))
    thieves = [Oracle(pair.victims["victim"], Access.QUERY) for _ in range(2)]
    first, again, other = (one.once(pair.data.train, 3).log_p for one in (thieves[0], *thieves))
    assert torch.equal(first, again)
    assert not torch.equal(first, other), "another thief gets another answer"
    assert thieves[0].ledger.billed == len(pair.data.train)
    resumed = Oracle(pair.victims["victim"], Access.QUERY)
    resumed.load_state_dict(thieves[0].state_dict())
    assert torch.equal(resumed.once(pair.data.train, 3).log_p, first), "a stopped thief keeps what he bought"


def test_self_agreement_counts_images_whose_top_answer_stays() -> None:
    asked = [torch.tensor(rows) for rows in ([[1.0, 0], [1, 0], [0, 1]], [[2.0, 1], [0, 1], [0, 1]])]
    assert self_agreement(asked) == pytest.approx(2 / 3)


def own(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


STATE = own().state_dict()
CHECKPOINTS = {
    "plain": (STATE, None),
    "DataParallel": (prefixed("module.", STATE), "begin with 'module.'"),
    "compiled": (prefixed("_orig_mod.", STATE), "begin with '_orig_mod.'"),
    "compiled DDP": (prefixed("module._orig_mod.", STATE), "begin with 'module._orig_mod.'"),
    "Lightning": (
        {"state_dict": prefixed("model.", STATE) | {"loss.weight": torch.ones(3)}, "epoch": 3},
        "begin with 'model.'.*1 tensors beside the network's are unused .loss.weight",
    ),
    "backbone": (prefixed("backbone.", STATE), "begin with 'backbone.'"),
    "best": ({"state_dict": STATE, "best_acc1": 93.0, "optimizer": {"state": {}}}, "under 'state_dict' are taken"),
    "model": ({"model": STATE, "args": "x"}, "under 'model' are taken"),
    "net": ({"net": STATE, "acc": 1}, "under 'net' are taken"),
    "timm": (
        {"state_dict": own(2).state_dict(), "state_dict_ema": STATE},
        "under 'state_dict_ema' are taken; state_dict is there as well",
    ),
    "torchvision": ({"model": STATE, "args": Namespace(lr=0.1), "epoch": 9}, "under 'model' are taken"),
    "nested": ({"model": {"state_dict": STATE, "arch": "x"}, "epoch": 9}, "under 'model' are taken"),
    "shadow": ({"model": STATE, "ema": {"decay": 0.9, "shadow": {}}}, "under 'model' are taken"),
    "averaged": ({"model_ema": {"n_averaged": torch.tensor(3)} | prefixed("module.", STATE)}, "begin with 'module.'"),
    "torch 0.3": ({name: value for name, value in STATE.items() if "num_batches" not in name}, None),
    "half": ({name: value.half() if value.is_floating_point() else value for name, value in STATE.items()}, None),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_others_are_read(name: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    content, word = CHECKPOINTS[name]
    torch.save(content, tmp_path / "weights.pt")
    network = own(3)
    load_weights(network, tmp_path / "weights.pt")
    for part, value in network.state_dict().items():
        assert torch.allclose(value, STATE[part], atol=1e-3), part
    assert (word is None) == (not said.text)
    if word:
        assert re.search(word, said.text.replace("\n", " "))


def test_a_key_can_be_named(tmp_path: Path) -> None:
    torch.save({"state_dict": own(2).state_dict(), "state_dict_ema": STATE}, tmp_path / "weights.pt")
    network = own(3)
    load_weights(network, tmp_path / "weights.pt", "state_dict")
    assert torch.equal(network[0].weight, own(2)[0].weight)
    with pytest.raises(ModelError, match="did you mean 'state_dict'"):
        load_weights(network, tmp_path / "weights.pt", "state_dic")


def test_a_network_that_wraps_another_takes_the_others_file(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = own(3)

    for state in (STATE, prefixed("module.", STATE)):
        torch.save(state, tmp_path / "weights.pt")
        network = Wrapped()
        load_weights(network, tmp_path / "weights.pt")
        assert torch.equal(network.body[0].weight, STATE["0.weight"])


def test_suffixes_do_not_matter(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "safe.pt")
    torch.save(STATE, tmp_path / "torch.safetensors")
    torch.save(STATE, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("safe.pt", "torch.safetensors", "old.ckpt"):
        assert torch.equal(read_state(tmp_path / name)["0.weight"], STATE["0.weight"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.to(torch.int8), r"5\.weight is torch.int8, quantised or cut off"),
        (lambda w: w.to_sparse(), r"5\.weight is sparse"),
        (lambda w: w.to("meta"), r"5\.weight is without data"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), r"is quantised|damaged, or no plain"),
        (lambda w: w[:, :2].clone(), r"another architecture: 5\.weight is \(3, 2\)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_cannot_be_held_are_refused(change, why: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.save(STATE | {"5.weight": change(STATE["5.weight"])}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=why):
        load_weights(own(), tmp_path / "weights.pt")


def test_pointers_and_whole_modules_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(ModelError, match=r"Git LFS pointer.*git lfs pull"):
        load_weights(own(), tmp_path / "lfs.safetensors")
    torch.save(own(), tmp_path / "whole.pt")
    with pytest.raises(ModelError, match="weights_only=False") as caught:
        load_weights(own(), tmp_path / "whole.pt")
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    work: dict[str, object] = {"torch": torch}
    exec("\n".join(lines).replace('"weights.pt"', repr(str(tmp_path / "weights.pt"))), work)
    load_weights(own(3), tmp_path / "weights.pt")


def test_an_adapter_leaves_names_and_answers_alone() -> None:
    network = own().eval()
    network.stages = ["1", "2"]  # type: ignore[assignment]
    images = torch.rand(5, *SHAPE)
    adapter = Adapter(mean=(0.5,), std=(0.25,), order=(2, 0, 1))
    assert Adapter.parse(str(adapter)) == adapter
    adapted = adapter.wrap(network, 1, 3)
    assert adapted.state_dict().keys() == network.state_dict().keys()
    assert torch.allclose(adapted(images), network((images - 0.5) / 0.25)[:, [2, 0, 1]])
    other = adapter.wrap(own(2), 1, 3).eval()
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(images), adapted(images))
    assert [type(part) for part in Model.parse("ConvNet").stages(adapted)] == [nn.BatchNorm2d, nn.ReLU]
    soft = Adapter(probabilities=True).wrap(nn.Sequential(network, nn.Softmax(1)), 1, 3)
    assert torch.allclose(soft(images), network(images).log_softmax(1), atol=1e-5)
    assert Adapter().wrap(network, 1, 3) is network
    with pytest.raises(ModelError, match="mean and std have 2 values; images have 1 channels"):
        Adapter(mean=(0.5, 0.5), std=(1, 1)).wrap(network, 1, 3)
