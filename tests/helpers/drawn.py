"""Tensors drawn from a seed, and given as gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def normals(shapes: Iterable, seed: int = 0, dtype: torch.dtype = torch.float32,
            device: torch.device | str = "cpu") -> list[Tensor]:
    """Drawn in float64 where that is asked for, else in float32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = dtype if dtype == torch.float64 else torch.float32
    return [torch.randn(s, generator=generator, dtype=drawn).to(device, dtype) for s in shapes]


def give(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Copies, of the parameters' dtype."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone().to(p)


def assert_close(params: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    """To float64's precision."""
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-11, atol=1e-12, msg=lambda m: what + m)
