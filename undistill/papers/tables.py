"""Tables 1 to 3 of "Undistillable" (Ma et al., ICLR 2021) as lists of cases, which reproduce.py measures.

A dash is a value that is not known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from undistill.attacks.attack import Attack
from undistill.attacks.labels.hard_labels import HardLabels
from undistill.attacks.labels.scratch import Scratch
from undistill.defences.defence import Defence
from undistill.papers.case import Case, Teacher
from undistill.papers.scales import DATA_FREE, Scale, Setting, Student, setting

HARDWARE = (
    "Minutes are those of one seed with nothing done yet; experiments in one folder share teachers, and are done one "
    "after another. 'small': one CPU core, the other busy with the like, measured, or estimated where it says 'about'; "
    "'--launcher pool --workers 2' uses both, and took 52 minutes for table1. "
    "'gpu': as 'paper' in 30 epochs, with one teacher; not measured yet. "
    "'paper': a GPU with 10^14 operations a second, calculated by 'python -m benchmarks.paper'. What the paper reports "
    "is quoted second-hand and unverified."
)
"""Notes on the times and published values that docstrings of experiments give."""
HARD, SCRATCH = HardLabels(), Scratch()
Published = Mapping[str, Mapping[str, float]]
"""Percent, by row ("none", "ResNet-18 normal", "ResNet-18 nasty") and column ("teacher", or the student)."""


def table1(scale: Scale) -> list[Case]:
    """Table 1: CIFAR-10, ResNet-18 as teacher; students CNN, ResNetC-20, ResNetC-32, ResNet-18.

    Expected: nasty within a point of normal; students of the nasty one 2 to 4 points below students without teacher.
    `small` 110 minutes, `paper` 31.
    """
    published = {
        "none": {"CNN": 86.64, "ResNetC-20": 92.28, "ResNetC-32": 93.04, "ResNet-18": 95.13},
        "ResNet-18 normal": {
            "teacher": 95.13,
            "CNN": 87.75,
            "ResNetC-20": 92.49,
            "ResNetC-32": 93.31,
            "ResNet-18": 95.39,
        },
        "ResNet-18 nasty": {
            "teacher": 94.56,
            "CNN": 82.46,
            "ResNetC-20": 88.01,
            "ResNetC-32": 89.69,
            "ResNet-18": 93.41,
        },
    }
    return list(table(setting("CIFAR-10", scale), {} if scale == "smoke" else published))


def table2(scale: Scale) -> list[Case]:
    """Table 2: CIFAR-100; ResNet-18, ResNet-50 and ResNeXt-29 as teachers.

    Expected: nasty within 2 points of normal; ShuffleNetV2 loses 10 to 15 points, MobileNetV2 collapses (`collapse`).
    `small` 110 minutes, with one teacher and the students of table 1; `paper` 410.
    """
    published = {
        "none": {"ShuffleNetV2": 71.17, "MobileNetV2": 69.12, "ResNet-18": 77.44},
        "ResNet-18 normal": {"teacher": 77.44, "ShuffleNetV2": 74.24, "MobileNetV2": 73.11, "ResNet-18": 79.03},
        "ResNet-18 nasty": {"teacher": 77.42, "ShuffleNetV2": 64.49, "MobileNetV2": 3.45, "ResNet-18": 74.81},
        "ResNet-50 normal": {
            "teacher": 78.12,
            "ResNet-50": 80.02,
            "ShuffleNetV2": 74.00,
            "MobileNetV2": 72.81,
            "ResNet-18": 79.65,
        },
        "ResNet-50 nasty": {
            "teacher": 77.14,
            "ResNet-50": 75.03,
            "ShuffleNetV2": 63.16,
            "MobileNetV2": 3.36,
            "ResNet-18": 71.94,
        },
        "ResNeXt-29 normal": {
            "teacher": 81.85,
            "ResNeXt-29": 83.53,
            "ShuffleNetV2": 74.50,
            "MobileNetV2": 72.43,
            "ResNet-18": 80.84,
        },
        "ResNeXt-29 nasty": {
            "teacher": 80.26,
            "ResNeXt-29": 75.08,
            "ShuffleNetV2": 58.99,
            "MobileNetV2": 1.55,
            "ResNet-18": 68.52,
        },
    }
    return list(table(setting("CIFAR-100", scale), {} if scale == "smoke" else published))


def table3(scale: Scale) -> list[Case]:
    """Table 3: Tiny-ImageNet; ResNet-18, ResNet-50 and ResNeXt-29 as teachers.

    Expected: nasty within 3 points of normal; students lose 5 to 35 points against those of the normal teacher, and
    MobileNetV2 collapses. No `small`: these images were not at hand. `paper` 3,250 minutes.
    """
    published = {
        "none": {"ShuffleNetV2": 55.74, "MobileNetV2": 51.72, "ResNet-18": 58.73},
        "ResNet-18 normal": {"teacher": 58.73, "ShuffleNetV2": 58.09, "MobileNetV2": 55.99, "ResNet-18": 61.45},
        "ResNet-18 nasty": {"teacher": 57.77, "ShuffleNetV2": 23.16, "MobileNetV2": 1.82, "ResNet-18": 44.73},
        "ResNet-50 normal": {
            "teacher": 62.01,
            "ResNet-50": 63.91,
            "ShuffleNetV2": 58.01,
            "MobileNetV2": 54.18,
            "ResNet-18": 62.01,
        },
        "ResNet-50 nasty": {
            "teacher": 60.06,
            "ResNet-50": 51.27,
            "ShuffleNetV2": 41.84,
            "MobileNetV2": 1.41,
            "ResNet-18": 48.24,
        },
        "ResNeXt-29 normal": {
            "teacher": 62.81,
            "ResNeXt-29": 64.22,
            "ShuffleNetV2": 57.87,
            "MobileNetV2": 54.34,
            "ResNet-18": 62.38,
        },
        "ResNeXt-29 nasty": {
            "teacher": 60.21,
            "ResNeXt-29": 59.54,
            "ShuffleNetV2": 42.73,
            "MobileNetV2": 1.09,
            "ResNet-18": 54.53,
        },
    }
    return list(table(setting("Tiny-ImageNet", scale), {} if scale == "smoke" else published))


def data_free(scale: Scale) -> list[Case]:
    """Thieves without data, who have the weights: DAFL as in the paper (ResNet-34 teaches ResNet-18), and Fast.

    `small` is on Fashion-MNIST, with DeepInversion as well; `figure synthesised` draws all their images. Expected: the
    normal teacher's student is useful, the nasty one's is worse (CIFAR-10: 92.49 and 86.15). `small` 80 minutes,
    `paper` 1,500.
    """
    published = {
        "CIFAR-10: normal": 95.42,
        "CIFAR-10: normal -> DAFL": 92.49,
        "CIFAR-10: nasty": 94.54,
        "CIFAR-10: nasty -> DAFL": 86.15,
        "CIFAR-100: normal": 76.97,
        "CIFAR-100: normal -> DAFL": 71.06,
        "CIFAR-100: nasty": 76.12,
        "CIFAR-100: nasty -> DAFL": 65.67,
    }
    cases = []
    for data, thief in DATA_FREE[scale].items():
        chosen = setting(data, scale)
        teacher = replace(chosen.teacher(), model=thief.teacher or chosen.teacher().model)
        cases += [Case(f"{data}: {side}", teacher, defence) for side, defence in chosen.sides]
        for name, (attack, recipe) in thief.attacks.items():
            for side, defence in chosen.sides:
                cases.append(Case(f"{data}: {side} -> {name}", teacher, defence, None, attack, thief.student, recipe))
    return [replace(case, published=published.get(case.name)) for case in cases]


def fashion(scale: Scale) -> list[Case]:
    """The columns of table 1 on Fashion-MNIST, which the paper does not have: the same shape is expected.

    `small` about 40 minutes.
    """
    return list(table(setting("Fashion-MNIST", scale), {}))


def table(chosen: Setting, published: Published) -> Iterator[Case]:
    """Students without teacher, then each teacher, normal and nasty, with its students; from the nasty one also those
    that learn its top answers alone, which the paper does not have, and beside which every value is read."""
    for name, student in chosen.students.items():
        known = published.get("none", {}).get(name)
        yield _taught(f"Scratch / {name}", chosen.teacher(), None, SCRATCH, student, known)
    for teacher in chosen.teachers:
        for side, defence in chosen.sides:
            row, victim = f"{teacher} {side}", chosen.teacher(teacher)
            of_row = published.get(row, {})
            yield Case(row, victim, defence, published=of_row.get("teacher"))
            for name, student in chosen.students_of(teacher).items():
                yield _taught(
                    f"{row} -> SoftLabels / {name}", victim, defence, chosen.attack, student, of_row.get(name)
                )
                if defence:
                    yield _taught(f"{row} -> HardLabels / {name}", victim, defence, HARD, student, None)


def _taught(
    name: str, teacher: Teacher, defence: Defence | None, attack: Attack, student: Student, published: float | None
) -> Case:
    return Case(
        name, teacher, defence, attack=attack, student=student.model, recipe=student.recipe, published=published
    )
