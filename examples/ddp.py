"""DistributedDataParallel: each process has a part of every batch.

    torchrun --nproc-per-node 2 examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py --local-first-pass
"""

import argparse
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAM, freeze_bn_stats


def equal_on_all_ranks(model):
    """Whether all replicas have the same bits."""
    mine = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return all(torch.equal(mine, other) for other in theirs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--local-first-pass", action="store_true",
                        help="each process climbs by its own gradient: one all-reduce less a step")
    parser.add_argument("--quick", action="store_true", help="5 epochs")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("start this with: torchrun --nproc-per-node 2 examples/ddp.py")
    dist.init_process_group("gloo")                  # "nccl" on GPUs
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)                             # the same data and weights everywhere
    x = torch.randn(512, 16)
    y = x[:, :4].argmax(1)
    model = DistributedDataParallel(nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)
    for epoch in range(5 if args.quick else args.epochs):
        for batch in torch.randperm(512, generator=torch.Generator().manual_seed(epoch)).split(64):
            mine = batch[rank::ranks]
            with opt.local_first_pass(model) if args.local_first_pass else nullcontext():
                loss = cross_entropy(model(x[mine]), y[mine])
                loss.backward()
            opt.first_step(zero_grad=True)
            with freeze_bn_stats(model):
                cross_entropy(model(x[mine]), y[mine]).backward()
            opt.second_step(zero_grad=True)
        if rank == 0:
            print(f"epoch {epoch + 1:2}  loss {loss.item():.3f}", flush=True)
    equal = equal_on_all_ranks(model)
    if rank == 0:
        print("all replicas have the same bits" if equal else "REPLICAS DIFFER")
    dist.barrier()  # over gloo, one that leaves first may abort another that is leaving
    dist.destroy_process_group()
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
