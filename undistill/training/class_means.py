"""Mean answers of classes, which run over an epoch."""

import torch
from torch import Tensor

from undistill.core import distributed


class ClassMeans:
    """Mean probabilities of the images of each class that were seen in this epoch, by all processes."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_classes, num_classes, device=device)
        self.counts = torch.zeros(num_classes, 1, device=device)
        self.epoch = -1

    def __call__(self, log_p: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Log of the mean answer (B, K) of each label's class; the answers `log_p` (B, K) are among those averaged.

        labels: (B,), or shares (B, K), by which an answer counts for several classes.
        """
        if epoch != self.epoch:
            self.epoch = epoch
            self.sums.zero_()
            self.counts.zero_()
        shares = labels if labels.ndim == 2 else torch.zeros_like(log_p).scatter(1, labels[:, None], 1.0)
        with torch.autocast(log_p.device.type, enabled=False):  # products would be bf16
            self.sums += distributed.all_reduce(shares.T @ log_p.exp())
            self.counts += distributed.all_reduce(shares.sum(0)[:, None])
            return (shares @ (self.sums / self.counts.clamp_min(1e-12))).clamp_min(1e-30).log()
