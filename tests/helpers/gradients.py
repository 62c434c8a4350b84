"""Giving a parameter a gradient of another dtype."""

import torch
from torch import Tensor


def give(p: Tensor, g: Tensor | None) -> None:
    """p.grad = g. Until torch 2.10 a gradient of another dtype comes in through `.data` alone."""
    if g is None or g.dtype == p.dtype:
        p.grad = g
    elif hasattr(torch.Tensor, "grad_dtype"):
        p.grad_dtype = None
        p.grad = g
    else:
        p.grad = torch.empty_like(p)
        p.grad.data = g
