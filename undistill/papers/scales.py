"""How large an experiment is: `smoke` on digits, `small` on two cores, `gpu` short on a GPU, `paper` as published."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from undistill.attacks.attack import Attack
from undistill.attacks.data_free.dafl import DAFL
from undistill.attacks.data_free.deep_inversion import DeepInversion
from undistill.attacks.data_free.fast import Fast
from undistill.attacks.distillation.soft_labels import SoftLabels
from undistill.core.errors import SpecError, unknown
from undistill.data.cifar import CIFAR10, CIFAR100
from undistill.data.digits import Digits
from undistill.data.idx import FashionMNIST
from undistill.data.source import Source
from undistill.data.tiny_imagenet import TinyImageNet
from undistill.data.views import Views
from undistill.defences.defence import Defence
from undistill.defences.nasty import Nasty
from undistill.models.convnet import ConvNet
from undistill.models.mobilenetv2 import MobileNetV2
from undistill.models.model import Model
from undistill.models.plaincnn import PlainCNN
from undistill.models.resnet import ResNet
from undistill.models.resnetc import ResNetC
from undistill.models.resnext import ResNeXt
from undistill.models.shufflenetv2 import ShuffleNetV2
from undistill.models.vgg import VGG
from undistill.papers.case import Teacher
from undistill.training.compute import FAST
from undistill.training.recipe import Recipe

Scale = Literal["smoke", "small", "gpu", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)

PHOTOS = Views(crop=0.125, flip=True)
CLOTHES = Views(crop=0.036, flip=True)
TINY = Views(crop=0, rotate=20, flip=True)


@dataclass(frozen=True)
class Student:
    """A thief's network, and how it is trained."""

    model: Model
    recipe: Recipe


@dataclass(frozen=True)
class Setting:
    """Networks, recipes and hyper-parameters of experiments on one data set at one scale. Names are the paper's."""

    data: Source
    teachers: Mapping[str, Model]
    """Networks; the first one is that of the ablations."""
    recipe: Recipe
    """How teachers are trained."""
    students: Mapping[str, Student]
    omega: float
    T: float
    alpha: float = 0.9
    warm_start: float | None = None
    """The share of the epochs in which a nasty teacher grows out of its honest twin; None starts from scratch."""
    weaker: Model | None = None
    stronger: Model | None = None
    """Networks of less and of more capacity than the first teacher, for the ablations."""
    twins: bool = False
    """Whether each teacher also has a student of its own architecture."""

    def students_of(self, teacher: str) -> dict[str, Student]:
        """Students by name; the one of the teacher's own architecture is called like the teacher."""
        twin = {teacher: Student(self.teachers[teacher], self.recipe)} if self.twins else {}
        return twin | dict(self.students)

    def teacher(self, name: str = "") -> Teacher:
        """The teacher of that name, by default the first one."""
        return Teacher(self.data, self.teachers[name or next(iter(self.teachers))], self.recipe)

    @property
    def student(self) -> Student:
        """The first one, which is that of the ablations."""
        return next(iter(self.students.values()))

    @property
    def sides(self) -> tuple[tuple[str, Defence | None], ...]:
        """Both kinds of teacher, each with its defence."""
        return ("normal", None), ("nasty", self.defence)

    def recipe_of(self, model: Model) -> Recipe:
        """How that network is trained: as the student that it is, or else as a teacher."""
        return next((student.recipe for student in self.students.values() if student.model == model), self.recipe)

    @property
    def defence(self) -> Nasty:
        return Nasty(omega=self.omega, T=self.T, warm_start=self.warm_start)

    @property
    def attack(self) -> SoftLabels:
        return SoftLabels(T=self.T, alpha=self.alpha)


@dataclass(frozen=True)
class DataFree:
    """A thief without data: by name his attacks, each with the training of his network."""

    student: Model
    attacks: Mapping[str, tuple[Attack, Recipe]]
    teacher: Model | None = None
    """Teacher that is attacked; by default the first of the setting."""


def sgd(epochs: int, drops: tuple[float, ...], gamma: float, views: Views, batch_size: int = 128) -> Recipe:
    """The authors' schedule: SGD 0.1, momentum 0.9, weight decay 5e-4, batch 128, in steps (files of their code).

    They train on all images and keep the epoch that is best on the test images. Here teachers leave out a tenth of the
    images, and students another tenth of the rest; the best epoch on those is kept, or with
    `reproduce --select-on-test` that on the test images. Compute settings are the fastest of a trial, bf16 among them;
    they trained in fp32.
    """
    return Recipe(
        epochs=epochs,
        batch_size=batch_size,
        lr=0.1,
        schedule="step",
        warmup=0,
        drops=drops,
        gamma=gamma,
        clip=0,
        selection="best",
        compute=FAST,
        views=views,
    )


def adam(epochs: int, views: Views) -> Recipe:
    """The authors' plain CNN: Adam 1e-3."""
    return sgd(epochs, (), 0.1, views).model_copy(update={"optimiser": "adamw", "lr": 1e-3, "weight_decay": 0.0})


def one_cycle(epochs: int, lr: float, views: Views, batch_size: int = 128) -> Recipe:
    """A short schedule."""
    return Recipe(epochs=epochs, batch_size=batch_size, lr=lr, compute=FAST, views=views)


def shortened(paper: "Setting") -> "Setting":
    """`paper` in minutes on a GPU: its networks, images, omega and T, and the first of its teachers alone.

    What differs: SGD with one cycle up to 0.2 in 30 epochs of batch 256, for teachers and students alike, the plain CNN
    among them, with clipping. The epoch that is best on validation images is kept, as in `paper`.
    """
    recipe = one_cycle(30, 0.2, paper.recipe.views, 256).model_copy(update={"selection": "best"})
    students = {name: Student(student.model, recipe) for name, student in paper.students.items()}
    name, teacher = next(iter(paper.teachers.items()))
    return replace(paper, recipe=recipe, students=students, teachers={name: teacher})


_CIFAR10_SGD = sgd(160, (0.5, 0.75), 0.1, PHOTOS)
_CIFAR100_SGD = sgd(200, (0.3, 0.6, 0.8), 0.2, PHOTOS)
_TINY_SGD = sgd(200, (0.3, 0.6, 0.8), 0.2, TINY)
_LARGE = {"ResNet-18": ResNet(depth=18), "ResNet-50": ResNet(depth=50), "ResNeXt-29": ResNeXt()}


def _large_students(recipe: Recipe) -> dict[str, Student]:
    models = {"ShuffleNetV2": ShuffleNetV2(), "MobileNetV2": MobileNetV2(), "ResNet-18": ResNet(depth=18)}
    return {name: Student(model, recipe) for name, model in models.items()}


def _small(data: Source, teacher: Model, omega: float, T: float, views: Views, width: tuple[int, int]) -> Setting:
    """Two cores: part of the images, a network that fits them, narrow students (of `width`)."""
    thief = one_cycle(40, 0.1, views)
    return Setting(
        data=data,
        teachers={"ResNet-18": teacher},
        recipe=one_cycle(30, 0.1, views),
        students={
            "CNN": Student(PlainCNN(width=width[0]), thief),
            "ResNetC-20": Student(ResNetC(depth=8, width=width[1]), thief),
        },
        omega=omega,
        T=T,
        warm_start=0.5,
        weaker=PlainCNN(width=16),
        stronger=VGG(width=48),
    )


_SMOKE = Setting(
    data=Digits(),
    teachers={"ResNet-18": ConvNet(width=8)},
    recipe=Recipe(epochs=6),
    students={"CNN": Student(ConvNet(width=2), Recipe(epochs=6))},
    omega=0.03,
    T=4,
    weaker=ConvNet(width=4),
    stronger=ConvNet(width=12),
)
_SMALL = {
    "CIFAR-10": _small(CIFAR10(count=25000), VGG(width=32), 0.08, 4, PHOTOS, (16, 8)),
    "CIFAR-100": _small(CIFAR100(count=25000), VGG(width=32), 0.02, 20, PHOTOS, (16, 8)),
    "Fashion-MNIST": _small(FashionMNIST(count=20000), PlainCNN(width=32), 0.08, 4, CLOTHES, (4, 4)),
}
_PAPER = {
    "CIFAR-10": Setting(
        data=CIFAR10(),
        teachers={"ResNet-18": ResNet(depth=18)},
        recipe=_CIFAR10_SGD,
        students={
            "CNN": Student(PlainCNN(), adam(100, PHOTOS)),
            "ResNetC-20": Student(ResNetC(depth=20), _CIFAR10_SGD),
            "ResNetC-32": Student(ResNetC(depth=32), _CIFAR10_SGD),
            "ResNet-18": Student(ResNet(depth=18), _CIFAR10_SGD),
        },
        omega=0.04,
        T=4,
        weaker=PlainCNN(),
        stronger=ResNet(depth=50),
    ),
    "CIFAR-100": Setting(
        data=CIFAR100(),
        teachers=_LARGE,
        recipe=_CIFAR100_SGD,
        students=_large_students(_CIFAR100_SGD),
        omega=0.005,
        T=20,
        twins=True,
    ),
    "Tiny-ImageNet": Setting(TinyImageNet(), _LARGE, _TINY_SGD, _large_students(_TINY_SGD), 0.01, T=20, twins=True),
}

_GPU = {name: shortened(paper) for name, paper in _PAPER.items()}
_TABLES = {"small": _SMALL, "gpu": _GPU, "paper": _PAPER}

COLLAPSING: Mapping[Scale, tuple[Student, float]] = {
    "smoke": (Student(ConvNet(width=2), Recipe(epochs=6, clip=0)), 1.0),
    "small": (Student(MobileNetV2(width=0.25), sgd(15, (0.3, 0.6, 0.8), 0.2, PHOTOS)), 0.4),
    "gpu": (Student(MobileNetV2(), sgd(30, (0.3, 0.6, 0.8), 0.2, PHOTOS)), 1.0),
    "paper": (Student(MobileNetV2(), _CIFAR100_SGD), 1.0),
}
"""The student that collapses in the paper (CIFAR-100), with the published setting of its training, and his share of
the teacher's images."""

DIVERGING: Mapping[Scale, Mapping[str, tuple[Teacher, float]]] = {
    "smoke": {"digits": (Teacher(Digits(), ConvNet(width=4), Recipe(epochs=6, clip=0)), 0.03)},
    "small": {
        "CIFAR-100": (
            Teacher(CIFAR100(count=10000), ResNet(depth=50, width=16), sgd(6, (0.3, 0.6, 0.8), 0.2, PHOTOS)),
            0.005,
        ),
        "CIFAR-10": (
            Teacher(CIFAR10(count=10000), ResNet(width=16), sgd(20, (0.5, 0.75), 0.1, PHOTOS, 512)),
            0.04,
        ),
    },
    "gpu": {
        "CIFAR-100": (Teacher(CIFAR100(), ResNet(depth=50), sgd(10, (0.3, 0.6, 0.8), 0.2, PHOTOS)), 0.005),
        "CIFAR-10": (Teacher(CIFAR10(), ResNet(depth=18), sgd(30, (0.5, 0.75), 0.1, PHOTOS, 512)), 0.04),
    },
    "paper": {
        "CIFAR-100": (Teacher(CIFAR100(), ResNet(depth=50), _CIFAR100_SGD), 0.005),
        "CIFAR-10": (Teacher(CIFAR10(), ResNet(depth=18), sgd(160, (0.5, 0.75), 0.1, PHOTOS, 512)), 0.04),
    },
}
"""The nasty teachers that end in NaN for users of the authors' code, and the published omega of each."""


def _data_free(one_hot: float, dafl: Recipe, epochs: int) -> DataFree:
    """Settings of the attacks' authors, from memory: DAFL, whose entropy is a decimal logarithm, trained by `dafl`, and
    Fast-5 in so many `epochs` of batch 256 after 20 batches of images."""
    fast = sgd(epochs, (), 0.1, PHOTOS, 256).model_copy(update={"lr": 0.2, "weight_decay": 1e-4, "schedule": "cosine"})
    return DataFree(
        ResNet(depth=18),
        {
            "DAFL": (DAFL(lr=0.02, latent=1000, one_hot=one_hot, entropy=2.17, T=1), dafl),
            "Fast": (Fast(every=400, lr=0.003, statistics=10, adversarial=1.33, T=20, bank=60000), fast),
        },
        teacher=ResNet(depth=34),
    )


_DAFL = sgd(6000, (0.4, 0.8), 0.1, PHOTOS, 1024)
DATA_FREE: Mapping[Scale, Mapping[str, DataFree]] = {
    "smoke": {
        "digits": DataFree(
            ConvNet(width=8),
            {
                "DAFL": (DAFL(), Recipe(epochs=6)),
                "Fast": (Fast(), Recipe(epochs=6)),
                "DeepInversion": (DeepInversion(count=100, steps=20), Recipe(epochs=40)),
            },
        )
    },
    "small": {
        "Fashion-MNIST": DataFree(
            PlainCNN(width=16),
            {
                "DAFL": (DAFL(width=32, lr=0.05, one_hot=0.2, T=4), one_cycle(45, 0.1, CLOTHES, batch_size=64)),
                "Fast": (Fast(width=32), one_cycle(90, 0.1, CLOTHES)),
                "DeepInversion": (DeepInversion(count=1000, steps=300, variation=2), one_cycle(400, 0.1, CLOTHES)),
            },
        )
    },
    "gpu": {"CIFAR-10": _data_free(1, sgd(60, (0.4, 0.8), 0.1, PHOTOS, 256), 60)},
    "paper": {"CIFAR-10": _data_free(1, _DAFL, 503), "CIFAR-100": _data_free(0.5, _DAFL, 503)},
}
"""Thieves without data. At `paper` DAFL makes 240,000 steps of batch 1,024 and Fast 80,000 of 256; at `gpu` each makes
9,500 of 256."""


def parse_scale(text: str) -> Scale:
    """`SpecError` for a scale that there is not."""
    for scale in SCALES:
        if scale == text:
            return scale
    raise SpecError(unknown("scale", text, SCALES))


def setting(data: str, scale: Scale) -> Setting:
    """The setting for `data` at a scale; `SpecError` if that scale has no such data set."""
    if scale == "smoke":
        return _SMOKE
    known = _TABLES[scale]
    if data not in known:
        others = [name for name, table in _TABLES.items() if data in table]
        raise SpecError(
            f"{data} has no {scale} scale, which has {', '.join(known)}. Use --scale {' or '.join([*others, 'smoke'])}."
        )
    return known[data]
