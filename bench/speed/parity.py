"""The gate before every speed: three steps against the papers' formulas in float64."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.speed.contenders import ADAPTIVE, FRIENDLY, Contender
from bench.speed.timing import Runner, random_like

SHAPES = ((64, 3, 3, 3), (64,), (33, 41), (7,), (1,))  # wide blocks and odd tails
# Allowed error in parts of the distance that a phase moves the weights.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
# Nothing neutral, and moves about as long as the weights, which keeps bf16's rounding small.
BASE_HYPER: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.6, "momentum": 0.8, "weight_decay": 0.05},
    "adamw": {"lr": 0.8, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.2},
}
PERTURBATIONS = (
    {"rho": 30.0, "sigma": 0.7, "lmbda": 0.6, "alpha": 0.3},
    {"rho": 30.0, "sigma": 1, "lmbda": 0.9, "alpha": 0.3},
)


def sgd(w: Tensor, grads: list[Tensor], h: dict) -> Tensor:
    """Return w after SGD's next step, from all gradients so far, each with its weight decay: the
    momentum buffer is v = sum over k of momentum^k g_(t-k)."""
    v = sum((h["momentum"] ** k * g for k, g in enumerate(reversed(grads))), torch.zeros_like(w))
    return w - h["lr"] * v


def adamw(w: Tensor, grads: list[Tensor], h: dict) -> Tensor:
    """Return w after AdamW's next step (Loshchilov and Hutter 2019), from all gradients so far."""

    def average(values: list[Tensor], beta: float) -> Tensor:
        terms = ((1 - beta) * beta**k * x for k, x in enumerate(reversed(values)))
        total = sum(terms, torch.zeros_like(w))
        return total / (1 - beta ** len(values))

    (beta1, beta2), lr = h["betas"], h["lr"]
    root = average([g.square() for g in grads], beta2).sqrt()
    return (1 - lr * h["weight_decay"]) * w - lr * average(grads, beta1) / (root + h["eps"])


def exact_course(w: Tensor, passes: list[tuple[Tensor, ...]], method: str, base: str,
                 convention: str, h: dict) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Yield every step's (w before, w' after the climb, w after the step).

    w: all weights as one float64 vector. passes: each step's gradients of both passes, likewise.
    convention: Friendly-SAM's, "algorithm1" or "official", as fastsam.FriendlySAM's.
    """
    m: Tensor | None = None
    seen: list[Tensor] = []
    for g1, g2 in passes:
        d = g1
        if method == "msam":  # against the momentum, or Adam's first moment
            factor, share = (h["momentum"], 1) if base == "sgd" else (h["betas"][0],
                                                                      1 - h["betas"][0])
            d = -share * sum((factor**k * g for k, g in enumerate(reversed(seen))),
                             torch.zeros_like(w))  # fmt: skip
        if method in FRIENDLY and convention == "algorithm1":
            m = (1 - h["lmbda"]) * g1 + (0 if m is None else h["lmbda"] * m)
            d = g1 - h["sigma"] * m
        elif method in FRIENDLY:
            d = g1 if m is None else g1 - h["sigma"] * m
            m = g1 if m is None else (1 - h["lmbda"]) * g1 + h["lmbda"] * m
        T = w.abs() if method in ADAPTIVE else torch.ones_like(w)
        climbed = w + h["rho"] * T**2 * d / ((T * d).norm() + 1e-12)
        if method == "gsam":
            g2 = g2 - h["alpha"] * (g1 - (g1 @ g2) / (g2 @ g2) * g2)
        seen.append(g2 + h["weight_decay"] * w if base == "sgd" else g2)
        after = sgd(w, seen, h) if base == "sgd" else adamw(w, seen, h)
        yield w, climbed, after
        w = after


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().to("cpu", torch.float64).flatten() for t in tensors])


def course_error(contender: Contender, base: str, dtype: torch.dtype, device: torch.device,
                 graph: bool, hyper: dict) -> float:  # fmt: skip
    """Return the largest error after any phase of three steps, as a part of the distance that the
    phase is to move the weights. graph: three more steps follow, as replayed CUDA graphs."""
    weights = random_like(SHAPES, dtype, device, seed=0)
    passes = [
        tuple(random_like(SHAPES, dtype, device, seed=2 * i + j) for j in (1, 2))
        for i in range(6 if graph else 3)
    ]
    exact = exact_course(flat(weights), [tuple(map(flat, both)) for both in passes],
                         contender.method, base, contender.convention, hyper)  # fmt: skip
    fixed = tuple([torch.zeros_like(w) for w in weights] for _ in range(2))
    runner, worst = Runner(contender, weights, fixed, hyper), 0.0
    for i, (gradients, (before, *targets)) in enumerate(zip(passes, exact, strict=True)):
        if i == 3:
            runner.capture()
        for mine, values in zip(fixed, gradients, strict=True):
            for g, value in zip(mine, values, strict=True):
                g.copy_(value)
        for target, _ in zip(targets[-len(runner.phases) :], runner.step(), strict=True):
            off, way = (flat(runner.params) - target).norm(), (target - before).norm()
            error = off / way if way > 0 else torch.where(off == 0, 0.0, torch.inf)
            worst = max(worst, error.nan_to_num(torch.inf).item())
    return worst


def parity_error(contender: Contender, base: str, dtype: torch.dtype, device: torch.device,
                 graph: bool = False) -> float:  # fmt: skip
    """Return the worst course_error over the perturbations that tell the method's errors."""
    hypers = PERTURBATIONS if contender.method in FRIENDLY else PERTURBATIONS[:1]
    return max(
        course_error(contender, base, dtype, device, graph, BASE_HYPER[base] | perturbation)
        for perturbation in hypers
    )
