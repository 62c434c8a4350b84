"""What one training run works on, and its network's forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.config import Config
from bench.data import Data

Forward = Callable[[Tensor], Tensor]


@dataclass
class Run:
    """history: one row of metrics per finished epoch. epoch: the one that is under way. images:
    the augmented training images, see bench.data.training_images."""

    config: Config
    data: Data
    model: nn.Module
    opt: torch.optim.Optimizer
    device: torch.device
    history: list[dict[str, Any]]
    epoch: int = 0
    images: Any = None


def forward_of(run: Run) -> Forward:
    """Return images -> float32 logits, in the run's precision and memory format."""
    bf16 = run.config.amp == "bf16"
    layout = torch.channels_last if run.config.channels_last else torch.contiguous_format

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
            return run.model(x.contiguous(memory_format=layout)).float()

    return forward
