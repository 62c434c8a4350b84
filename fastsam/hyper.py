"""The hyper-parameters of a step: one row per parameter group, and the columns of the device table.

`COLUMNS` is the one source of the table's layout. Every kernel takes its column numbers from
`COLUMN`, so that a column is added in one place.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

FRIENDLY = ("algorithm1", "official")  # the modes with a moving average
GIVEN = ("full", "noise")  # those whose m is the user's: there is none until it is given
WITH_M = (*FRIENDLY, *GIVEN)  # those whose direction is made with m
KEEPING = ("gsam", "looksam")  # those that keep the first pass's gradient for the second


class Hyper(NamedTuple):
    """One group's hyper-parameters. A value is a number, or a tensor of one element on any
    device."""

    rho: float | Tensor
    sigma: float | Tensor
    lmbda: float | Tensor
    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float | Tensor
    nesterov: bool
    beta1: float
    beta2: float
    eps: float
    decoupled: bool
    alpha: float = 0.0

    # What follows from them, exact only when taken before rounding.

    @property
    def ema_share(self) -> float | Tensor:
        return 1 - self.lmbda

    @property
    def momentum_share(self) -> float:
        return 1 - self.dampening

    @property
    def beta1_share(self) -> float:
        return 1 - self.beta1

    @property
    def beta2_share(self) -> float:
        return 1 - self.beta2

    @property
    def log_beta1(self) -> float:
        return log(self.beta1)

    @property
    def log_beta2(self) -> float:
        return log(self.beta2)

    def corrections(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 - beta^t for both of Adam's, at step t."""
        return -torch.expm1(t * self.log_beta1), -torch.expm1(t * self.log_beta2)

    def columns(self) -> list:
        """The row of the device table."""
        return [*self, self.sigma, *(getattr(self, name) for name in FOLLOWING)]


def log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


FOLLOWING = ("ema_share", "momentum_share", "beta1_share", "beta2_share", "log_beta1", "log_beta2")
# given_sigma is sigma before a projection multiplies it
COLUMNS = (*Hyper._fields, "given_sigma", *FOLLOWING)
COLUMN = {name: i for i, name in enumerate(COLUMNS)}


def hyper_row(group: dict[str, Any], mode: str | None, base: str | None) -> Hyper:
    """One group's row: only what this optimizer and its fused base use.

    Args:
        mode: as `Kind.mode`.
        base: "sgd", "adam", or None for a base that takes its own step.
    """
    g = group if base else {}
    friendly = group if mode in FRIENDLY else {}
    alpha = group["alpha"] if mode in KEEPING and group["perturb"] else 0.0
    beta1, beta2 = g.get("betas", (0.0, 0.0))
    numbers: dict[str, Any] = dict(
        rho=group["rho"], sigma=friendly.get("sigma", 1.0), lmbda=friendly.get("lmbda", 0.0),
        lr=g.get("lr", 0.0), momentum=g.get("momentum", 0.0), dampening=g.get("dampening", 0.0),
        weight_decay=g.get("weight_decay", 0.0), beta1=beta1, beta2=beta2, eps=g.get("eps", 0.0),
        alpha=alpha)
    return Hyper(nesterov=bool(g.get("nesterov", False)),
                 decoupled=bool(g.get("decoupled_weight_decay", False)),
                 **{name: cast(Any, number(x)) for name, x in numbers.items()})


def number(x: Any) -> float | Tensor:
    """A number as one of Python's; a tensor as one without dimensions, over the same memory."""
    return x.detach().reshape(()) if isinstance(x, Tensor) else float(x)


def scaling_of(group: dict[str, Any], scales_with: str, name: str | None, ndim: int,
               ) -> tuple[float, float]:
    """(a, b) of the scaling T of one parameter: T = a |w| + b for ASAM, with (0, 1) for SAM;
    T = 1 / sqrt(1 + a g^2) for FisherSAM, whose a is its eta.

    Args:
        scales_with: "weights" (ASAM) or "gradient" (FisherSAM).
        name: the parameter's name, where named parameters were given.
        ndim: its number of dimensions.
    """
    if not group["adaptive"]:
        return 0.0, 1.0
    if scales_with == "gradient":
        return float(group["eta"]), 1.0
    if group.get("scale", "all") == "all":
        return 1.0, 0.0
    is_weight = "weight" in name if name is not None else ndim >= 2
    return (1.0, float(group["eta"])) if is_weight else (0.0, 1.0)
