import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from undistill.core.code import trust
from undistill.core.errors import ModelError, SpecError
from undistill.core.seeds import seeded
from undistill.models import ConvNet, Model, PlainCNN, features, load_weights
from undistill.models.adapter import Adapter
from undistill.runs.preprocessing import adapter_of

BUILT_IN = [name for name in Model.registry if name not in ("Factory", "Given", "Timm")]


def narrow(name: str) -> Model:
    """The model with few channels, where it has a field for them: whatever its width, it does the same."""
    width = Model.registry[name].model_fields.get("width")
    return Model.parse(f"{name}(width=8)" if width and width.annotation is int else name)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("shape", "classes"), [((1, 8, 8), 2), ((3, 32, 32), 99), ((1, 28, 9), 7), ((3, 64, 64), 20)])
def test_every_model_takes_every_shape(name: str, shape: tuple[int, int, int], classes: int) -> None:
    network = narrow(name).build(shape, classes, seed=0)
    assert network(torch.rand(3, *shape)).shape == (3, classes)


@pytest.mark.parametrize("name", BUILT_IN)
def test_same_seed_same_bits_and_the_caller_notices_nothing(name: str) -> None:
    torch.manual_seed(5)
    a, b, c = (narrow(name).build((1, 8, 8), 3, seed).state_dict() for seed in (0, 0, 1))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_plain_cnn_is_the_papers() -> None:
    network = PlainCNN().build((3, 32, 32), 10, 0)
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(2048, 128), (128, 10)]
    assert sum(p.numel() for p in network.parameters()) == 357_514


@pytest.mark.parametrize(
    ("spec", "shape", "classes", "parameters", "operations"),
    [
        # He et al. 2016, table 6 (0.27, 0.46, 0.85, 1.7 M) and the multiplications of its text for 32 x 32
        ("ResNetC(depth=20)", (3, 32, 32), 10, 272_282, 40.8),
        ("ResNetC(depth=32)", (3, 32, 32), 10, 466_714, 69.1),
        ("ResNetC(depth=56)", (3, 32, 32), 10, 855_578, 125.7),
        ("ResNetC(depth=110)", (3, 32, 32), 10, 1_730_522, 253.1),
        # the sizes of the common public implementations; 1.8 and 4.1 G at 224 x 224 (He et al. 2016, table 1)
        ("ResNet(depth=18)", (3, 32, 32), 10, 11_173_962, 555.4),
        ("ResNet(depth=18)", (3, 32, 32), 100, 11_220_132, 555.5),
        ("ResNet(depth=34)", (3, 32, 32), 10, 21_282_122, 1159.4),
        ("ResNet(depth=50)", (3, 32, 32), 10, 23_520_842, 1297.8),
        ("ResNet(depth=18)", (3, 64, 64), 200, 11_271_432, 2221.8),
        ("ResNet(depth=18)", (3, 224, 224), 1000, 11_689_512, 1814.1),
        ("ResNet(depth=34)", (3, 224, 224), 1000, 21_797_672, 3663.8),
        ("ResNet(depth=50)", (3, 224, 224), 1000, 25_557_032, 4089.2),
        # Xie et al. 2017, table 7: 34.4 M; the 5.4 G of public counts
        ("ResNeXt()", (3, 32, 32), 10, 34_426_698, 5387.3),
        # Zagoruyko and Komodakis 2016, table 4: 2.2 M for WRN-40-2; 27, 101 and 328 M in papers on distillation
        ("WRN(depth=16, width=1)", (3, 32, 32), 10, 175_066, 26.7),
        ("WRN(depth=16, width=2)", (3, 32, 32), 10, 691_674, 101.1),
        ("WRN(depth=40, width=2)", (3, 32, 32), 10, 2_243_546, 327.6),
        # Sandler et al. 2018, table 4: 3.4 M, 300 M
        ("MobileNetV2()", (3, 224, 224), 1000, 3_504_872, 300.8),
        ("MobileNetV2(width=0.5)", (3, 224, 224), 1000, 1_968_680, None),
        ("MobileNetV2()", (3, 32, 32), 100, 2_352_292, 44.1),
        # Ma et al. 2018, table 8: 2.3 M and 146 M for 1x, pooling counted
        ("ShuffleNetV2()", (3, 224, 224), 1000, 2_278_604, 144.9),
        ("ShuffleNetV2()", (3, 32, 32), 10, 1_263_854, 45.0),
        ("VGG()", (3, 32, 32), 10, 9_228_362, 152.8),
    ],
)
def test_networks_have_the_published_sizes(
    spec: str, shape: tuple[int, int, int], classes: int, parameters: int, operations: float | None
) -> None:
    """Parameters, and millions of multiply-adds for one image."""
    network = Model.parse(spec).build(shape, classes, 0).eval().to("meta")  # on which nothing is computed but shapes
    assert sum(p.numel() for p in network.parameters()) == parameters
    if operations:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, *shape, device="meta"))
        assert round(counter.get_total_flops() / 2e6, 1) == operations


@pytest.mark.parametrize(
    ("spec", "family"), [("ResNetC(depth=18)", "6n + 2"), ("WRN(depth=18)", "6n + 4"), ("ResNeXt(depth=30)", "9n + 2")]
)
def test_depths_of_no_network_are_refused(spec: str, family: str) -> None:
    with pytest.raises(SpecError, match=re.escape(family)):
        Model.parse(spec)


def test_too_small_images_are_explained() -> None:
    with pytest.raises(ModelError, match="needs 8 x 8 pixels; got 4 x 4"):
        PlainCNN().build((1, 4, 4), 2, 0)


def test_features_are_the_last_layers_inputs() -> None:
    network = Model.parse("ConvNet(width=4)").build((1, 8, 8), 3, 0).eval()
    images = torch.rand(5, 1, 8, 8)
    inner = features(network, images)
    assert inner is not None
    assert torch.allclose(network[-1](inner), network(images))
    assert features(nn.Flatten(), images) is None


FACTORIES = """
import torch
from torch import nn

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def all_of_it(num_classes, in_channels, image_size, hidden=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], hidden),
                         nn.Linear(hidden, num_classes))

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

def text(num_classes):
    return "a network"

def nan(num_classes):
    network = plain(num_classes)
    nn.init.constant_(network[1].bias, float("nan"))
    return network

def crash(num_classes):
    raise RuntimeError("no weights here")

def leave(num_classes):
    raise SystemExit(0)

class Auxiliary(nn.Sequential):
    def forward(self, x):
        answer = super().forward(x)
        return (answer, answer) if self.training else answer

def auxiliary(num_classes):
    return Auxiliary(nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(FACTORIES)
    for name in ("plain", "all_of_it", "fixed", "text", "nan", "crash", "leave", "auxiliary", "planes"):
        trust(f"{path}:{name}")
    return path


def test_users_factory_gets_what_it_asks_for(nets: Path) -> None:
    model = Model.parse(f"{nets}:all_of_it(hidden=7)")
    network = model.build((1, 8, 8), 3, 0)
    assert network[1].out_features == 7
    assert Model.parse(str(model)) == model
    assert Model.parse(f"{nets}:plain").build((1, 8, 8), 4, 0)(torch.rand(2, 1, 8, 8)).shape == (2, 4)


def test_factory_of_a_module_needs_no_file() -> None:
    trust("torch.nn:Identity")
    network = Model.parse("torch.nn:Identity").network((1, 8, 8), 3)
    assert isinstance(network, nn.Identity)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fixed", "answers two images with (2, 5) in training mode; for 3 classes"),
        ("text", "returned str; a factory must return a torch.nn.Module"),
        ("nan", "answers a blank image with NaN"),
        ("crash", "RuntimeError: no weights here"),
        ("leave", "raised SystemExit"),
        ("auxiliary", "answers two images with tuple in training mode"),
        ("planes", "did you mean 'plain'"),
        ("plain(width=3)", "unexpected keyword argument 'width'"),
    ],
)
def test_bad_factories_are_explained(nets: Path, name: str, said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        Model.parse(f"{nets}:{name}").build((1, 8, 8), 3, 0)


def test_networks_share_no_part_that_the_users_module_keeps(tmp_path: Path) -> None:
    (tmp_path / "kept.py").write_text(
        "from torch import nn\nPART = nn.Linear(64, 4)\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), PART, nn.Linear(4, num_classes))\n"
    )
    trust(f"{tmp_path / 'kept.py'}:make")
    one, other = (Model.parse(f"{tmp_path / 'kept.py'}:make").build((1, 8, 8), 3, seed) for seed in (0, 1))
    nn.init.zeros_(one[1].weight)
    assert other[1].weight.any()


def test_networks_too_large_to_build_are_explained() -> None:
    with pytest.raises(ModelError, match="cannot be built"):
        ConvNet.model_construct(width=10**20).build((1, 8, 8), 3, 0)
    with pytest.raises(SpecError, match=r"width = 99999999999999999999 is refused: .*less than or equal to 1024"):
        Model.parse("ConvNet(width=99999999999999999999)")


def test_missing_and_broken_files_are_explained(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make(:\n")
    for name, said in (("absent.py", "There is no file"), ("broken.py", "SyntaxError"), ("no.such.module", "failed")):
        reference = f"{tmp_path / name}:make" if name.endswith(".py") else f"{name}:make"
        trust(reference)
        with pytest.raises(ModelError, match=said):
            Model.parse(reference).build((1, 8, 8), 3, 0)


def test_files_of_the_same_flat_name_are_two_modules(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    widths = {}
    for file, width in (("a/b.py", 3), ("a_b.py", 4)):
        (tmp_path / file).write_text(f"from torch import nn\ndef make(): return nn.Linear({width}, 1)\n")
        trust(f"{tmp_path / file}:make")
        widths[file] = Model.parse(f"{tmp_path / file}:make").network((1, 8, 8), 3).in_features
    assert widths == {"a/b.py": 3, "a_b.py": 4}


def test_users_code_imports_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python net.py` and `python -m package.nets` would."""
    (tmp_path / "neighbour_of_net.py").write_text("WIDTH = 6\n")
    (tmp_path / "net.py").write_text(
        "from neighbour_of_net import WIDTH\nfrom torch import nn\ndef make(): return nn.Linear(WIDTH, 1)\n"
    )
    (tmp_path / "package_of_nets").mkdir()
    (tmp_path / "package_of_nets" / "nets.py").write_text((tmp_path / "net.py").read_text())
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for reference in (f"{tmp_path / 'net.py'}:make", "package_of_nets.nets:make"):
        trust(reference)
        assert Model.parse(reference).network((1, 8, 8), 3).in_features == 6


def test_trying_a_network_leaves_it_as_it_was() -> None:
    network = Model.parse("ConvNet(width=2)").build((1, 8, 8), 3, 0)
    assert network.training
    assert not any(value.any() for name, value in network.named_buffers() if not name.endswith("running_var"))


@pytest.fixture
def network() -> nn.Module:
    return Model.parse("ConvNet(width=2)").build((1, 8, 8), 3, 0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_load_from_both_formats(network: nn.Module, tmp_path: Path, suffix: str) -> None:
    other = Model.parse("ConvNet(width=2)").build((1, 8, 8), 3, 1)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(other.state_dict(), path)
    load_weights(network, path)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in other.state_dict().items())


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('executed')",)


def test_pickles_are_refused_unread(network: nn.Module, tmp_path: Path) -> None:
    for number, content in enumerate((network, {"weights": Bomb()}, [1, 2])):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        with pytest.raises(ModelError, match="state dict"):
            load_weights(network, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_weights_are_refused(network: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError):
        load_weights(network, path)
    path.write_bytes(b"")
    with pytest.raises(ModelError):
        load_weights(network, path)


def test_weights_of_another_architecture_are_named(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(Model.parse("ConvNet(width=3)").build((1, 8, 8), 3, 0).state_dict(), path)
    with pytest.raises(ModelError, match=r"another architecture: .* is \("):
        load_weights(network, path)
    save_file(Model.parse("PlainCNN(width=2)").build((1, 8, 8), 3, 0).state_dict(), path)
    with pytest.raises(ModelError, match=r"missing .* and .* more; unexpected"):
        load_weights(network, path)


def test_non_finite_weights_are_refused(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    state["5.bias"] = torch.full_like(state["5.bias"], float("nan"))
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"5\.bias holds NaN"):
        load_weights(network, tmp_path / "w.safetensors")


def test_seeded_restores_the_callers_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(9):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in BUILT_IN for field in Model.registry[name].model_fields]
)
def test_every_field_of_a_model_changes_the_network(name: str, field: str) -> None:
    plain = narrow(name)
    value = getattr(plain, field)
    another = value / 2 if isinstance(value, float) else value + 18
    others = get_args(Model.registry[name].model_fields[field].annotation) or (another,)
    changed = type(plain)(**(plain.model_dump() | {field: others[-1]}))
    networks = [model.build((1, 8, 8), 3, 0) for model in (plain, changed)]
    assert len({sum(p.numel() for p in network.parameters()) for network in networks}) == 2


def test_networks_of_timm_go_by_their_name() -> None:
    spec = Model.parse("timm:resnet18")
    assert (str(spec), spec) == ("timm:resnet18", Model.parse(str(spec)))
    assert spec.refers() == {}, "a library's network is not the user's code"


def test_timm_builds_normalised_networks(boxes: None) -> None:
    network = Model.parse("timm:resnet18").build((3, 64, 64), 7, 0)
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    bare = network.network.eval()
    assert torch.allclose(network.eval()(mean), bare(torch.zeros(2, 3, 64, 64)), atol=1e-5)
    assert network.state_dict().keys() == bare.state_dict().keys()
    with pytest.raises(ModelError, match=r"timm has no network 'resnet-18'; .*resnet18"):
        Model.parse("timm:resnet-18").build((3, 64, 64), 7, 0)


def test_a_torchvision_of_another_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(ModelError, match=r"nms does not exist.*different builds"):
        Model.parse("timm:resnet18").build((3, 64, 64), 7, 0)


def test_timm_takes_its_own_arguments_and_files(boxes: None, tmp_path: Path) -> None:
    spec = Model.parse("timm:vit_tiny_patch16_224(img_size=32, patch_size=8, depth=2)")
    assert Model.parse(str(spec)) == spec
    network = spec.build((3, 32, 32), 7, 0)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    torch.save(network.network.state_dict(), tmp_path / "theirs.pt")
    other = spec.build((3, 32, 32), 7, 1)
    load_weights(other, tmp_path / "theirs.pt")
    torch.save({f"1.{name}": value for name, value in network.state_dict().items()}, tmp_path / "earlier.pt")
    load_weights(spec.build((3, 32, 32), 7, 1), tmp_path / "earlier.pt")
    with pytest.raises(SpecError, match="normalise images by themselves; leave out --preprocess imagenet"):
        adapter_of("imagenet", network)
    assert adapter_of("timm", network) == Adapter()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items())
    with pytest.raises(ModelError, match=r"cannot be built: .*unexpected keyword argument 'depht'"):
        Model.parse("timm:vit_tiny_patch16_224(depht=2)").build((3, 32, 32), 7, 0)


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"undistill\[timm\]"):
        Model.parse("timm:resnet18").build((3, 64, 64), 7, 0)
