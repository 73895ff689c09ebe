"""The plain loop that every benchmark is compared with: what public distillation code does.

fp32, default layout, per-sample transforms in a DataLoader, the teacher run at every step, `.item()` at every step.
With a GPU, batches come from pinned memory.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Augmented(Dataset[tuple[Tensor, int]]):
    """Pad, crop and flip one PIL image at a time, then to a tensor."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).numpy(), labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index])
        width, height = image.size
        left, top = torch.randint(0, 9, (2,)).tolist()
        image = ImageOps.expand(image, 4).crop((left, top, left + width, top + height))
        if torch.rand(1).item() < 0.5:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, self.labels[index]


def train(
    training: str,
    network: nn.Module,
    teacher: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    batch: int,
    workers: int,
) -> Iterator[float]:
    """Seconds of each step, its data included. `training`: normal, nasty (omega 0.04) or kd (alpha 0.9), T = 4."""
    device = next(network.parameters()).device
    pinned = device.type == "cuda"
    loader = DataLoader(Augmented(images, labels), batch, shuffle=True, num_workers=workers, pin_memory=pinned)
    optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    network.train()
    total, began = 0.0, time.perf_counter()
    for x, y in loader:
        x, y = x.to(device, non_blocking=pinned), y.to(device, non_blocking=pinned)
        z = network(x)
        loss = F.cross_entropy(z, y)
        if teacher is not None:
            with torch.no_grad():
                answers = teacher(x)
            nasty = training == "nasty"
            loss = loss - 0.04 * 16 * kl(z, answers) if nasty else 0.1 * loss + 0.9 * 16 * kl(answers, z)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item()
        yield time.perf_counter() - began
        began = time.perf_counter()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div((q / 4).log_softmax(1), (p / 4).softmax(1), reduction="batchmean")
