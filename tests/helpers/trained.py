"""A network of seconds that has learnt scikit-learn's digits, for what attacks trained ones."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiments import peer_attacks
from bench.settings.evaluation import Evaluation, resolve_evaluation

EPS = 16 / 255


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images, (N, 1, 8, 8) in [0, 1], and labels."""
    return peer_attacks.digits()


@lru_cache(maxsize=1)
def model() -> nn.Module:
    """Trained on all but the last 297 images; in eval mode."""
    x, y = digits()
    with torch.enable_grad():  # a test's network may ask for it in a pass without
        return peer_attacks.trained(x[:1500], y[:1500], epochs=4)


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """n of the last 297 images that the model gets right, and labels."""
    x, y = (part[1500:] for part in digits())
    found = right(model(), x, y).nonzero().squeeze(1)
    return x[found[:n]], y[found[:n]]


def evaluation(**options: Any) -> Evaluation:
    """On the digits, at l_inf EPS, where the options say nothing else."""
    return resolve_evaluation("digits", {"linf": (EPS,), "l2": (), **options})


def right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether each image is recognised."""
    with torch.no_grad():
        return net(x).argmax(1) == y
