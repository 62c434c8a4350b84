"""The optimizer that a config asks for, and its learning rate at every step."""

import math
import sys
from typing import Any

import torch
from torch import nn

import fastsam
from bench.settings.config import Config


def build_optimizer(config: Config, model: nn.Module, steps: int = 0) -> torch.optim.Optimizer:
    """Return SGD, AdamW, or fastsam's optimizer around one. Raises ValueError as they do.

    steps: the number in an epoch, for a late start.
    """
    plain = config.base if config.rho is not None else config.optimizer
    cls = torch.optim.AdamW if plain == "adamw" else torch.optim.SGD
    base: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if plain == "sgd":
        base |= {"momentum": config.momentum, "nesterov": config.nesterov}
    w = model.parameters()
    if config.rho is None and config.graph:  # which is the plain optimizer, by the kernels
        return fastsam.SAM(w, cls, start=sys.maxsize, **base)
    if config.rho is None:
        return cls(w, **base)
    base |= {
        "rho": config.rho, "backend": config.backend, "interval": config.interval,
        "start": config.late_epoch * steps,
    }  # fmt: skip
    match config.optimizer:
        case "asam":
            return fastsam.ASAM(w, cls, scale=config.scale, eta=config.eta, **base)
        case "fishersam":
            return fastsam.FisherSAM(w, cls, eta=config.eta, **base)
        case "fsam" | "fasam":
            adaptive = config.optimizer == "fasam"
            return fastsam.FriendlySAM(
                w, cls, sigma=config.sigma, lmbda=config.lmbda, adaptive=adaptive,
                convention=config.convention or "algorithm1", **base,
            )  # fmt: skip
        case "sam-full" | "sam-noise":
            part = config.optimizer.removeprefix("sam-")
            return fastsam.FullGradientSAM(w, cls, part, projection=config.projection, **base)
        case "msam":
            return fastsam.MomentumSAM(w, cls, **base)
        case "gsam":
            return fastsam.GSAM(w, cls, alpha=config.gsam_alpha, **base)
        case "looksam":
            k = base.pop("interval")
            return fastsam.LookSAM(w, cls, alpha=config.look_alpha, k=k, **base)
        case _:
            return fastsam.SAM(w, cls, **base)


def lr_at(config: Config, epoch: int, step: int, steps: int) -> float:
    """Return the learning rate of one step.

    piecewise: x0.1 from 75% and again from 90% of the epochs (SAM_AT 5.1). cosine, linear: to 0,
    changing at every step (F-SAM's code; airbench's). Before that it grows in equal steps to
    config.lr, which it reaches at the end of the first config.warmup of all steps. steps: the
    number in an epoch.
    """
    done, total = epoch * steps + step, config.epochs * steps
    rising = round(config.warmup * total)
    if done < rising:
        return config.lr * (done + 1) / rising
    if config.schedule == "piecewise":
        drops = (epoch >= 0.75 * config.epochs) + (epoch >= 0.9 * config.epochs)
        return config.lr * 0.1**drops
    t = (done - rising) / (total - rising)
    return config.lr * (1 - t if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * t)))
