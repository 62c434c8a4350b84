"""The processes that torchrun started: each trains on its share of every batch, the first writes.

In a single process every function here does nothing, or returns what it was given.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WAIT = timedelta(minutes=30)  # for what one process does alone, such as the first one's writing


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join what torchrun started, over nccl for "cuda" and gloo for "cpu"; leave it afterwards.

    Of the GPUs each process takes the one of its local rank. Raises ValueError for a device of
    which there are too few, or that has a number of its own.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"under torchrun every process has a device of its own, so device {device!r} cannot "
            "be meant; pass --device cuda, or cpu"
        )
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU, there are "
                f"{torch.cuda.device_count()}; pass torchrun --nproc-per-node "
                f"{max(1, torch.cuda.device_count())}, or --device cpu"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=WAIT)
    try:
        yield
        dist.barrier()  # over gloo, one that leaves first may abort another that is leaving
    finally:
        dist.destroy_process_group()


def replicated(model: nn.Module, sync_bn: bool) -> nn.Module:
    """Return the module that training passes go through, so that gradients are the processes' mean.

    sync_bn: normalise by the whole batch's statistics. Running ones are `same_statistics`' to
    align: DistributedDataParallel would write them between TRADES' two forward passes.
    """
    if processes() == 1:
        return model
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    names = inspect.signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers"  # in torch 2.15 the name for what was broadcast_buffers
    options: dict[str, Any] = {new if new in names else "broadcast_buffers": False}
    return DistributedDataParallel(model, **options)


def share(t: Tensor) -> Tensor:
    """Return this process's part of a batch; the parts' lengths differ by one at most."""
    return t.tensor_split(processes())[rank()]


def weight(n: int) -> float:
    """Return what this process's mean counts in the mean over processes, of a batch of n images.

    Its part of the images times the number of processes: the mean over processes is then that over
    the images.
    """
    parts = processes()
    mine = n // parts + (rank() < n % parts)
    return mine * parts / n


def total(t: Tensor) -> Tensor:
    """Return the sum over the processes."""
    if processes() > 1:
        t = t.clone()
        dist.all_reduce(t)
    return t


def mean(tensors: list[Tensor]) -> list[Tensor]:
    """Return each tensor's mean over the processes."""
    if processes() == 1:
        return tensors
    flat = total(torch.cat([t.flatten() for t in tensors])) / processes()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def highest(value: int, device: torch.device) -> int:
    """Return the highest of the processes' numbers."""
    if processes() == 1:
        return value
    t = torch.tensor(value, device=device)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return int(t)


@torch.no_grad()
def same_statistics(model: nn.Module) -> None:
    """Give every process the first one's buffers, such as BatchNorm's running statistics."""
    if processes() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for b in model.buffers():
        by_dtype.setdefault(b.dtype, []).append(b)
    for buffers in by_dtype.values():
        flat = torch.cat([b.flatten() for b in buffers])
        dist.broadcast(flat, 0)
        for b, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            b.copy_(part.view(b.shape))


def gathered(value: Any) -> list[Any]:
    """Return the processes' values, in their order."""
    values = [value] * processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(function: Callable[..., Any], *args: Any) -> Any:
    """Return what `function` returns in the first process; no other one calls it."""
    values = [function(*args) if rank() == 0 else None]
    if processes() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]
