"""One training in several processes that `torchrun` started; with one process everything here does nothing.

Every process holds all data and sees the same global order of batches, of which it takes its share.
Batch norm sees the whole batch. The first process alone writes files.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from undistill.core.errors import LaunchError

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def require_one(command: str) -> None:
    """`LaunchError` for a command that is not one training."""
    if launched():
        raise LaunchError(
            f"torchrun is for train and protect; start '{command}' without it. An audit spreads its cells "
            "with --launcher pool or --launcher ray."
        )


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started work together: nccl on GPUs, gloo elsewhere."""
    if not launched() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where nccl works for this process
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> str:
    """`cuda` means this process's own GPU; `LaunchError` where there are fewer GPUs than processes."""
    if name != "cuda" or not launched():
        return name
    rank, processes, gpus = os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
    if int(rank) >= gpus > 0:
        raise LaunchError(
            f"torchrun started {processes} processes on a machine that has {gpus} GPU{'s' * (gpus > 1)}. Start one "
            f"for each GPU (--nproc-per-node={gpus}), or compute on processors (--device cpu)."
        )
    return f"cuda:{rank}"


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def broadcast(value: T) -> T:
    """The value of the first process."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    values: list[Any] = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def all_true(condition: bool) -> bool:
    """Whether it is true in all processes."""
    return all(all_gather(condition))


def shard(index: Tensor) -> Tensor:
    """This process's share of one batch."""
    return index.tensor_split(world())[rank()]


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def in_turns(parts: Sequence[T], answers: Callable[[Sequence[T]], Iterable[Tensor]]) -> Tensor:
    """The answers to all parts, concatenated; the processes answer in turns and all get the whole, in main memory."""
    own = [answer.cpu() for answer in answers(parts[rank() :: world()])]
    if world() == 1:
        return torch.cat(own)
    everyone = all_gather(own)
    return torch.cat([everyone[number % world()][number // world()] for number in range(len(parts))])


def parallel(network: nn.Module, sample: Callable[[], Tensor]) -> nn.Module:
    """A module that trains `network`, whose parameters and buffers it shares, together with the other processes.

    It is tried on two images of `sample`, (B, C, H, W) in [0, 1].
    """
    if world() == 1:
        return network
    images = sample().repeat(2, 1, 1, 1)[:2]
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = _with_global_norm(deepcopy(network, shared), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what is to replace broadcast_buffers is not there yet
        return DistributedDataParallel(
            twin,
            device_ids=[images.device] if images.is_cuda else None,
            broadcast_buffers=False,
            find_unused_parameters=_leaves_some_unused(network, images),
        )


def _leaves_some_unused(network: nn.Module, images: Tensor) -> bool:
    """Whether some trainable parameter has no part in the answer."""
    trial = deepcopy(network).train()
    trial.zero_grad()
    trial(images).sum().backward()
    return any(parameter.grad is None for parameter in trial.parameters() if parameter.requires_grad)


def loss_scale(size: int, whole: int) -> float:
    """Factor from the mean over this process's part to its share in the mean over the batch, DDP's average undone."""
    return size * world() / whole


def _with_global_norm(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Batch norms replaced below `module`; a part that is registered twice stays one part."""
    if isinstance(module, _BatchNorm):
        return GlobalBatchNorm(module)
    for name, child in module._modules.items():
        if child is not None:
            if id(child) not in done:
                done[id(child)] = _with_global_norm(child, done)
            module._modules[name] = done[id(child)]
    return module


class GlobalBatchNorm(nn.Module):
    """Batch norm over the images of all processes (torch's own SyncBatchNorm is for GPUs alone)."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not (norm.training or norm.running_mean is None):
            return norm(x)  # type: ignore[no-any-return]
        values, others = x.float(), [0, *range(2, x.dim())]
        own = torch.full((1,), float(values[:, 0].numel()), device=x.device)
        *_, count = totals = _global_sum(torch.cat([values.sum(others), own]))
        mean = totals[:-1] / count
        shape = (1, -1, *(1 for _ in range(x.dim() - 2)))
        centred = values - mean.view(shape)
        variance = _global_sum(centred.square().sum(others)) / count
        if norm.training and norm.running_mean is not None:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        result = centred * (variance + norm.eps).rsqrt().view(shape)
        if norm.affine:
            result = result * norm.weight.view(shape) + norm.bias.view(shape)
        normed: Tensor = result.to(x.dtype)
        return normed

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance, share)


def _global_sum(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """The sum over all processes, forward and backward."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return all_reduce(values.clone())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone())
