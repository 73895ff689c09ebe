"""Self-undermining knowledge distillation (Ma et al., ICLR 2021) with torch alone.

    python examples/nasty_in_one_screen.py        # about 10 seconds on a CPU

Trains a normal teacher, a nasty one that answers as differently as it can, and a student of each.
A test keeps these functions equal to the package, bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import nn


def kl(p, q, T):
    """KL( softmax(p/T) || softmax(q/T) ), mean over the batch."""
    return F.kl_div(F.log_softmax(q / T, 1), F.log_softmax(p / T, 1), reduction="batchmean", log_target=True)


def nasty_loss(nasty, adversary, labels, omega, T):
    """Be right, and be as far as possible from what a normal network answers."""
    return F.cross_entropy(nasty, labels) - omega * T**2 * kl(nasty, adversary, T)


def student_loss(student, teacher, labels, T, alpha):
    """Hinton's distillation: imitate the softened answers of the teacher."""
    return alpha * T**2 * kl(teacher, student, T) + (1 - alpha) * F.cross_entropy(student, labels)


def train(network, images, labels, loss, epochs, batches=8, lr=0.05, seed=0):
    """SGD on `loss(logits, batch images, batch labels)`."""
    optimiser = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        network.train()
        torch.manual_seed(seed << 32 | epoch)
        for index in torch.randperm(len(labels)).tensor_split(batches):
            optimiser.zero_grad()
            loss(network(images[index]), images[index], labels[index]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimiser.step()
    return network.eval().requires_grad_(False)


def convnet(width, num_classes):
    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes)]
    return nn.Sequential(*block(1, width), *block(width, 2 * width), *head)


def toy_images(count, num_classes=6, side=12):
    """Noisy pictures: each class is a fixed random pattern, half of it shared with its neighbour."""
    patterns = torch.rand(num_classes, 1, side, side, generator=torch.Generator().manual_seed(0))
    patterns = (patterns + patterns.roll(1, 0)) / 2
    labels = torch.randint(num_classes, (count,))
    return (patterns[labels] + 0.2 * torch.randn(count, 1, side, side)).clamp(0, 1), labels


def main(omega=0.04, T=4.0, alpha=0.9, epochs=20):
    torch.manual_seed(1)
    (images, labels), (test_images, test_labels) = toy_images(1000), toy_images(1000)
    score = lambda network: f"{(network(test_images).argmax(1) == test_labels).float().mean():.1%}"  # noqa: E731
    normal = train(convnet(16, 6), images, labels, lambda z, x, y: F.cross_entropy(z, y), epochs)
    nasty = train(convnet(16, 6), images, labels, lambda z, x, y: nasty_loss(z, normal(x), y, omega, T), epochs)
    for name, teacher in (("normal", normal), ("nasty", nasty)):
        student = convnet(3, 6)
        train(student, images, labels, lambda z, x, y: student_loss(z, teacher(x), y, T, alpha), epochs)  # noqa: B023
        print(f"{name} teacher {score(teacher)}, its student {score(student)}")


if __name__ == "__main__":
    main()
