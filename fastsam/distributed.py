"""Sharded parameters (DTensor: FSDP2, tensor parallelism), and what ranks must agree on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(p: Tensor) -> "TypeGuard[DTensor]":
    """Whether p is a DTensor, of which this process holds a part or a copy."""
    return hasattr(p, "device_mesh") and hasattr(p, "placements")


def shards_of(p: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which p is sharded: () for a plain or only replicated parameter.

    Raises:
        ValueError: p is a partial sum, which is no parameter yet, or a shard of
            FullyShardedDataParallel (FSDP1), a plain tensor that knows nothing of the others.
    """
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is a shard of "
                         "FullyShardedDataParallel: use torch.distributed.fsdp.fully_shard")
    if not is_sharded(p):
        return ()
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} has placements {p.placements}: "
                         "redistribute partial sums before building the optimizer")
    return tuple(p.device_mesh.get_group(i) for i, placement in enumerate(p.placements)
                 if not placement.is_replicate())  # is_shard() leaves out strided shards


def placed_like(p: Tensor, g: Tensor) -> Tensor:
    """A gradient of p, in p's placements: tensor parallelism leaves partial sums, for example,
    in the gradients of replicated parameters."""
    if not is_sharded(p) or not is_sharded(g) or g.placements == p.placements:
        return g
    return g.redistribute(p.device_mesh, p.placements)


def like(p: Tensor, shard: Tensor) -> Tensor:
    """This process's part of a state tensor, sharded as p is; of a plain p, `shard` itself."""
    if not is_sharded(p):
        return shard
    from torch.distributed.tensor import DTensor

    # the same memory without an offset, which breaks torch's copies of DTensors (as made by
    # copy.deepcopy and torch.distributed.checkpoint.async_save)
    shard = torch.utils.dlpack.from_dlpack(shard)
    return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False,
                              shape=p.shape, stride=p.stride())


def all_ok(ok: Tensor, group: dist.ProcessGroup) -> Tensor:
    """1 where `ok`, a 0-dim tensor, is 1 on every rank of the group."""
    ok = ok.clone()
    dist.all_reduce(ok, dist.ReduceOp.MIN, group=group)
    return ok


def ddp_of(model: torch.nn.Module) -> torch.nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel model that this is, or that torch.compile was called with."""
    inner: torch.nn.Module | None = model
    while inner is not None and not isinstance(inner, torch.nn.parallel.DistributedDataParallel):
        inner = getattr(inner, "_orig_mod", None)
    return inner


def group_of(model: torch.nn.Module) -> dist.ProcessGroup:
    """The process group of a DistributedDataParallel model, compiled or not.

    Raises:
        ValueError: another kind of model.
    """
    ddp = ddp_of(model)
    if ddp is None:
        raise ValueError(f"model is a {type(model).__name__}: a first pass of each rank's own "
                         "needs torch.nn.parallel.DistributedDataParallel")
    return ddp.process_group


@torch.no_grad()
def average_gradients(params: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Average `.grad` over the ranks. What was averaged already stays as it is; a rank without a
    gradient of a parameter that others have one of counts as zero."""
    there = torch.tensor([p.grad is not None for p in params], dtype=torch.int32,
                         device=params[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX, group=group)
    for p, somewhere in zip(params, there.tolist(), strict=True):
        if somewhere:
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=getattr(p, "grad_dtype", None))
            dist.all_reduce(p.grad, group=group)
            p.grad /= group.size()
