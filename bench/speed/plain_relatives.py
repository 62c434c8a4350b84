"""Momentum-SAM, GSAM and LookSAM as their papers state them, one parameter after another in plain
PyTorch, over a base optimizer whose weight decay is its own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.speed.baselines import PerParameterSAM


def product(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """<x, y> over all parameters."""
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)]).sum()


class PerParameterMomentumSAM(PerParameterSAM):
    """Momentum-SAM (Becker et al. 2024): w' = w - rho v / ||v|| before the only pass, where v is
    the momentum buffer that SGD's step before has left; 0 at first."""

    climbs_first = True

    def directions(self) -> list[Tensor]:
        states = [self.base_optimizer.state.get(p, {}) for p in self.params]
        vs = [s.get("momentum_buffer") for s in states]
        return [torch.zeros_like(p) if v is None else -v
                for p, v in zip(self.params, vs, strict=True)]  # fmt: skip


class Keeping(PerParameterSAM):
    """Keeps the first pass's gradient for the second. Args: as PerParameterSAM's, and alpha."""

    def __init__(self, params: Iterable[Tensor], base_optimizer: type[Optimizer], rho: float,
                 alpha: float, **kwargs: Any) -> None:  # fmt: skip
        self.alpha = alpha
        super().__init__(params, base_optimizer, rho, **kwargs)
        self.first: list[Tensor] = []

    def first_step(self) -> None:
        self.first = [g.clone() for g in self.directions()]
        super().first_step()


class PerParameterGSAM(Keeping):
    """GSAM (Zhuang et al. 2022): steps with g' - alpha h, h = g - <g, g'> / ||g'||^2 g'."""

    @torch.no_grad()
    def second_step(self) -> None:
        second = self.directions()
        share = product(self.first, second) / product(second, second)
        for p, g, g2 in zip(self.params, self.first, second, strict=True):
            p.grad = g2 - self.alpha * (g - share * g2)
        super().second_step()


class PerParameterLookSAM(Keeping):
    """LookSAM (Liu et al. 2022): every k-th step is SAM's and keeps g_v = g' - <g', g> / ||g||^2 g;
    the others take g + alpha ||g|| / ||g_v|| g_v. Args: as Keeping's, and k."""

    def __init__(self, params: Iterable[Tensor], base_optimizer: type[Optimizer], rho: float,
                 alpha: float, k: int, **kwargs: Any) -> None:  # fmt: skip
        self.k, self.steps = k, 0
        super().__init__(params, base_optimizer, rho, alpha, **kwargs)
        self.g_v: list[Tensor] = []

    @torch.no_grad()
    def second_step(self) -> None:
        grads = self.directions()
        if self.climbs_next:
            share = product(grads, self.first) / product(self.first, self.first)
            self.g_v = [g2 - share * g for g2, g in zip(grads, self.first, strict=True)]
        else:
            scale = self.alpha * (product(grads, grads) / product(self.g_v, self.g_v)).sqrt()
            for p, g, g_v in zip(self.params, grads, self.g_v, strict=True):
                p.grad = g + scale * g_v
        super().second_step()
        self.steps += 1
        self.climbs_next = self.steps % self.k == 0
