"""Images that a source holds twice: one copy is enough, and none may stand in training and test alike."""

from dataclasses import replace

import torch

from undistill.core.errors import remark
from undistill.data.files import ImageFiles
from undistill.data.split import Parts, Samples

ORDER = ("test", "validation", "train")
"""A copy stays in the first of these parts that has one."""


def comparable(*parts: Samples) -> list[list[bytes]]:
    """Hashes of the images of each part, equal for equal images: of files only where every part lies in files."""
    in_files = {isinstance(part.images, ImageFiles) for part in parts}
    return [part.hashes(of_pixels=len(in_files) > 1) for part in parts]


def without_copies(parts: Parts, name: str) -> Parts:
    """Leave out every image that is a copy of another, and say how many; `name` is that of the source.

    Nothing is left out where a class would then have no image to train on, as where all images are the same.
    """
    labels: dict[bytes, int] = {}
    kept: dict[str, Samples] = {}
    copies = contradictions = 0
    found: dict[str, Samples] = {part: samples for part in ORDER if (samples := getattr(parts, part)) is not None}
    for (part, samples), images in zip(found.items(), comparable(*found.values()), strict=True):
        new = []
        for index, (image, label) in enumerate(zip(images, samples.labels.tolist(), strict=True)):
            if image not in labels:
                labels[image] = label
                new.append(index)
            contradictions += labels[image] != label
        kept[part] = samples[torch.tensor(new, dtype=torch.long)]
        copies += len(samples) - len(new)
    if not copies:
        return parts
    if len(labels) == 1:
        remark(f"{name}: all {copies + 1:,} images are the same; nothing can be learnt from them.")
        return parts
    what = f"{name}: {copies:,} images are copies of others"
    if contradictions:
        what += f", {contradictions:,} of them in another class"
    if set(parts.train.labels.tolist()) - set(kept["train"].labels.tolist()):
        remark(f"{what}; they are used all the same, since a class would have none left.")
        return parts
    remark(f"{what}; they are left out, so that none stands in training and test alike.")
    validation = kept.get("validation")
    if validation is not None and not len(validation):
        remark(f"{name}: all validation images are copies of test images; others are taken from train.")
        validation = None
    return replace(parts, train=kept["train"], validation=validation, test=kept.get("test"))
