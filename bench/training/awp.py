"""Adversarial weight perturbation (Wu, Xia, Wang 2020): a layer-wise climb in the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bench.attacks.pgd import unit
from bench.training import processes


def climbs(model: nn.Module, loss: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each perturbed parameter w_l with ||w_l|| g_l / ||g_l||, g the loss's gradient.

    Perturbed are the weights of at least two dimensions: no bias, no normalisation.
    """
    ws = [
        p for name, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and "weight" in name
    ]  # fmt: skip
    gs = processes.mean(list(torch.autograd.grad(loss, ws)))
    return [(w, w.detach().norm() * unit(g[None])[0]) for w, g in zip(ws, gs, strict=True)]


@contextmanager
def perturbed_weights(model: nn.Module, loss: Tensor, gamma: float) -> Iterator[None]:
    """Add gamma times the climb of `loss` to the weights, and subtract it after the block.

    An optimizer's step in the block sees the moved weights (momentum and weight decay too), as in
    the authors' code. No parameter's .grad is touched by the climb.
    """
    with torch.no_grad():
        moves = [(w, gamma * climb) for w, climb in climbs(model, loss)]
        for w, move in moves:
            w += move
    try:
        yield
    finally:
        with torch.no_grad():
            for w, move in moves:
                w -= move
