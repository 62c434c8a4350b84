"""An epoch under way: how far it is, and all that its rest depends on beside the weights.

The order of the images follows from (seed, epoch). Augmentation, attack and dropout draw as they
go, so the states of their generators are kept, those of every process.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.training import processes
from bench.training.run import Run

ORDER, AUGMENTATION, ATTACK, OTHERS = range(4)


def generator(run: Run, epoch: int, purpose: int, rank: int = 0) -> torch.Generator:
    """Return a generator of its own for (seed, epoch, purpose, rank)."""
    more = [rank] if rank else []
    seeds = np.random.SeedSequence([run.config.seed, epoch, purpose, *more])
    return torch.Generator(run.device).manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


class Position:
    """The beginning of an epoch, and after `load_state_dict` the place that was saved.

    batches: index tensors of the whole epoch's batches, of all processes together. done: how many
    of them are behind. sums: of loss and of right answers, over this process's images so far.
    seconds: of training. augmentation: the same generator in every process; attack: each its own.
    The global generators (dropout's) are set by both.
    """

    def __init__(self, run: Run, epoch: int) -> None:
        self.device, n = run.device, len(run.data.train)
        order = torch.randperm(n, generator=generator(run, epoch, ORDER), device=run.device)
        self.batches = order.tensor_split(math.ceil(n / run.config.batch_size))
        self.done, self.seconds = 0, 0.0
        self.sums = torch.zeros(2, dtype=torch.float64, device=run.device)
        self.augmentation = generator(run, epoch, AUGMENTATION)
        self.attack = generator(run, epoch, ATTACK, processes.rank())
        torch.manual_seed(generator(run, epoch, OTHERS, processes.rank()).initial_seed())

    def own(self) -> dict[str, Tensor]:
        """Return what each process has for itself."""
        state = {
            "sums": self.sums.cpu(),
            "augmentation": self.augmentation.get_state(),
            "attack": self.attack.get_state(),
            "global": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["global_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all processes, in each of them."""
        return {
            "done": self.done, "seconds": self.seconds, "processes": processes.gathered(self.own()),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.seconds = state["done"], state["seconds"]
        own = {k: t.cpu() for k, t in state["processes"][processes.rank()].items()}
        self.sums.copy_(own["sums"])
        self.augmentation.set_state(own["augmentation"])
        self.attack.set_state(own["attack"])
        torch.set_rng_state(own["global"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["global_cuda"], self.device)
