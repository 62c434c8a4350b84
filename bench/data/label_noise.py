"""Wrong labels on purpose: symmetric label noise, as published or by true rate."""

import random

import torch
from torch import Tensor


def noisy(labels: Tensor, classes: int, rate: float, kind: str, seed: int) -> Tensor:
    """Return (N,) labels of which a share is wrong; which ones and how is decided by `seed`.

    kind "published" (F-SAM's code): the first int(rate N) of a shuffled list of the images get a
    uniformly random label, which may be the right one, so that a share of rate (1 - 1/classes) is
    wrong. "true": exactly round(rate N) get a uniformly random one of the other labels.
    """
    rng, n = random.Random(seed), len(labels)
    order = list(range(n))
    rng.shuffle(order)
    given = labels.tolist()
    if kind == "published":
        for i in order[: int(rate * n)]:
            given[i] = rng.randint(0, classes - 1)
    else:
        for i in order[: round(rate * n)]:
            given[i] = (given[i] + rng.randint(1, classes - 1)) % classes
    return torch.tensor(given, dtype=labels.dtype)
