"""What a drawn optimizer is built of: weights, groups, a class and its base; and the gradients of a
pass."""

import math
from dataclasses import dataclass, field

import torch

from .variants import VARIANTS


class OwnSGD(torch.optim.SGD):
    """Not fused: a subclass takes its own step."""


class OwnAdamW(torch.optim.AdamW):
    """Not fused: a subclass takes its own step."""


CLASSES = {of.oracle["method"]: of.cls for of in VARIANTS.values() if "adaptive" not in of.own}
BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
         "own sgd": OwnSGD, "own adamw": OwnAdamW}


@dataclass(frozen=True)
class Weight:
    """One parameter. form: "contiguous", "channels_last", "transposed" or "gapped"; a lodger is a
    view into a storage that is larger, and shared with the other lodgers of its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    form: str = "contiguous"
    lodger: bool = False


@dataclass(frozen=True)
class Group:
    """A parameter group; tensors: what may be a tensor of its hyper-parameters is one."""

    weights: tuple[Weight, ...]
    hyper: dict
    tensors: bool = False


@dataclass(frozen=True)
class Setup:
    """An optimizer: its class (a key of CLASSES) with `own` arguments, its base (of BASES)."""

    groups: tuple[Group, ...]
    method: str = "sam"
    own: dict = field(default_factory=dict)
    base: str = "sgd"
    backend: str = "reference"
    options: dict = field(default_factory=dict)
    wrapped: bool = False
    named: bool = False


@dataclass(frozen=True)
class Grads:
    """One pass's gradients: normal of deviation `size`; bit i of `missing` and of `zero`: that of
    parameter i (modulo 8) is None, is 0. layout: "own", "contiguous", "transposed", "bucket"
    (misaligned, between NaNs) or "gapped"; wide: float32 where the weights have 16 bits and the
    base is fused."""

    seed: int
    size: float = 1.0
    missing: int = 0
    zero: int = 0
    layout: str = "own"
    wide: bool = False


def formed(values: torch.Tensor, form: str) -> torch.Tensor:
    """The same values with other strides, where their shape allows it."""
    if form == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if form == "transposed" and values.ndim >= 2:
        turned = list(reversed(range(values.ndim)))
        return values.permute(turned).contiguous().permute(turned)
    if form == "gapped" and values.ndim and values.shape[-1] > 1:
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), math.nan)
        return wide[..., ::2].copy_(values)
    return values.contiguous()


def in_a_bucket(values: torch.Tensor) -> torch.Tensor:
    bucket = values.new_full((values.numel() + 4,), math.nan)
    return bucket[1:1 + values.numel()].view(values.shape).copy_(values)
