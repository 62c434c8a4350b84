"""What one training run works on, and its network's forward and backward pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastsam
from bench.data.datasets import Data
from bench.settings.config import Config

Forward = Callable[[Tensor], Tensor]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler(enabled=False)


@dataclass
class Run:
    """history: one row of metrics per finished epoch. trained: the commit, versions and machine
    that trained from an epoch on, as often as these changed. epoch: the one that is under way.
    images: the augmented training images, see bench.data.datasets.training_images. net: what
    training passes go through where several processes train, see
    bench.training.processes.replicated; attacks always go through `model`. scaler: enabled for
    fp16. weight: what a mean over this process's images counts in the mean over processes, see
    bench.training.processes.weight. position: where in an epoch last.pt was written, see
    bench.training.epoch_state, until it is taken up there. graphs: by a batch's images, see
    bench.training.graphed."""

    config: Config
    data: Data
    model: nn.Module
    opt: torch.optim.Optimizer
    device: torch.device
    history: list[dict[str, Any]]
    trained: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0
    images: Any = None
    net: nn.Module | None = None
    scaler: torch.amp.GradScaler = field(default_factory=no_scaler)
    weight: float = 1.0
    position: dict[str, Any] | None = None
    graphs: dict[int, fastsam.GraphedStep] = field(default_factory=dict)


def forward_of(run: Run, net: nn.Module | None = None) -> Forward:
    """Return images -> float32 logits, in the run's precision and memory format.

    net: run.net in place of run.model, for passes that end in `backward`.
    """
    net, dtype = net or run.model, AUTOCAST.get(run.config.amp, torch.bfloat16)
    mixed = run.config.amp in AUTOCAST
    layout = torch.channels_last if run.config.channels_last else torch.contiguous_format

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(run.device.type, dtype, enabled=mixed):
            return net(x.contiguous(memory_format=layout)).float()

    return forward


def backward(run: Run, loss: Tensor) -> None:
    """Add to `.grad` the gradient of the mean loss over the images of all processes, scaled by
    run.scaler. loss: the mean over this process's."""
    run.scaler.scale(loss if run.weight == 1 else run.weight * loss).backward()
