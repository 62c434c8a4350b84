"""Momentum-SAM, GSAM and LookSAM as their authors publish them, on given gradients in float64.

Written from the equations and from what the authors' code does, not from fastsam. MarlonBecker/MSAM
(optimizer/msam.py, adamW_msam.py, looksam.py) and juntang-zhuang/GSAM (gsam/gsam.py): where one
divides by a norm, 1e-12 is added to it there.
"""

import torch
from torch import Tensor

TINY = 1e-12


def length(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


def product(x: list[Tensor], y: list[Tensor]) -> Tensor:
    return sum((a * b).sum() for a, b in zip(x, y, strict=True))


class SGD:
    """w = w - lr v, v = mu v + g + weight_decay w; v is 0 before the first step."""

    def __init__(self, w: list[Tensor], lr: float, momentum: float, weight_decay: float):
        self.w, self.v = [x.clone() for x in w], [torch.zeros_like(x) for x in w]
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    def step(self, grads: list[Tensor], decayed: list[Tensor] | None = None) -> None:
        """decayed: the weights whose decay is added to the gradients; None: w."""
        decayed = self.w if decayed is None else decayed
        for i, g in enumerate(grads):
            self.v[i] = self.momentum * self.v[i] + g + self.weight_decay * decayed[i]
            self.w[i] = self.w[i] - self.lr * self.v[i]


class AdamW:
    """Without weight decay, with which the authors of Momentum-SAM end the step."""

    def __init__(self, w: list[Tensor], lr: float, betas: tuple[float, float], eps: float):
        self.w, self.t = [x.clone() for x in w], 0
        self.v, self.u = ([torch.zeros_like(x) for x in w] for _ in "vu")
        self.lr, self.betas, self.eps = lr, betas, eps

    def step(self, grads: list[Tensor], decayed: list[Tensor] | None = None) -> None:
        self.t += 1
        one, two = self.betas
        for i, g in enumerate(grads):
            self.v[i] = one * self.v[i] + (1 - one) * g
            self.u[i] = two * self.u[i] + (1 - two) * g * g
            root = (self.u[i] / (1 - two ** self.t)) ** 0.5 + self.eps
            self.w[i] = self.w[i] - self.lr / (1 - one ** self.t) * self.v[i] / root


class MomentumSAM:
    """Algorithm 1: the weights stay at w - rho v / ||v|| between steps, and SGD's weight decay is
    that of these, which msam.py adds to the gradients before it moves them back."""

    def __init__(self, base: SGD | AdamW, rho: float):
        self.base, self.rho, self.scale = base, rho, 0.0
        self.moved = [x.clone() for x in base.w]

    def step(self, grads: list[Tensor]) -> None:
        base = self.base
        base.w = [x + self.scale * v for x, v in zip(self.moved, base.v, strict=True)]
        base.step(grads, decayed=self.moved)
        self.scale = self.rho / (length(base.v) + TINY)
        self.moved = [x - self.scale * v for x, v in zip(base.w, base.v, strict=True)]


class GSAM:
    """Algorithm 1, with the cosine of both gradients as in `gradient_decompose`."""

    def __init__(self, base: SGD | AdamW, rho: float, alpha: float):
        self.base, self.rho, self.alpha = base, rho, alpha

    def climbed(self, first: list[Tensor]) -> list[Tensor]:
        scale = self.rho / (length(first) + TINY)
        return [w + scale * g for w, g in zip(self.base.w, first, strict=True)]

    def step(self, first: list[Tensor], second: list[Tensor]) -> None:
        old, new = length(first), length(second)
        cosine = product(first, second) / (new * old + TINY)
        self.base.step([gp - self.alpha * (g - cosine * old * gp / (new + TINY))
                        for g, gp in zip(first, second, strict=True)])


class LookSAM:
    """Algorithm 1: g_v = g_s sin(theta), its norms over all parameters, as in looksam.py."""

    def __init__(self, base: SGD | AdamW, rho: float, alpha: float):
        self.base, self.rho, self.alpha = base, rho, alpha
        self.unit: list[Tensor] = []

    climbed = GSAM.climbed

    def sam_step(self, first: list[Tensor], second: list[Tensor]) -> None:
        share = product(first, second) / length(first) ** 2
        rest = [gs - share * g for g, gs in zip(first, second, strict=True)]
        self.unit = [x / length(rest) for x in rest]
        self.base.step(second)

    def step_between(self, grads: list[Tensor]) -> None:
        self.base.step([g + self.alpha * length(grads) * x
                        for g, x in zip(grads, self.unit, strict=True)])
