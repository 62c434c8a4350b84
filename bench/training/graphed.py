"""Training's step replayed as a CUDA graph; attacks stay outside, with generators of their own."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsam
from bench.training.run import AUTOCAST, Run


def graphed_step(run: Run, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Make one optimizer step on a batch that `attacked` made; return as bench.training.step does.

    An epoch's batches have at most two sizes; each has its graphs.
    """
    layout = torch.channels_last if run.config.channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    if len(y) not in run.graphs:
        run.graphs[len(y)] = fastsam.GraphedStep(
            run.model, mean_loss, cast(fastsam.SAM, run.opt), (x, y),
            autocast=AUTOCAST.get(run.config.amp),
        )
    step = run.graphs[len(y)]
    loss = step(x, y)
    return loss, cast(Tensor, step.output)


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), y)
