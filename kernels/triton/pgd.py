"""PGD's ascent steps on images in [0, 1], projections included (Madry et al. 2018)."""

import math
from numbers import Real

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...space import same_layout
from .common import BLOCK, OPTIONS, TYPES, read, takes

# One program walks a whole sample: it is wide, to keep enough loads under way on its own.
SAMPLE_BLOCK = 4096
SAMPLE_OPTIONS = {**OPTIONS, "num_warps": 16}
if "maxnreg" in OPTIONS:
    SAMPLE_OPTIONS["maxnreg"] = 64  # two programs of 512 threads per multiprocessor


def check(x_adv: Tensor, g: Tensor, x: Tensor, eps: float, alpha: float) -> None:
    """Raise ValueError for what the kernels below cannot take."""
    if x.dim() == 0:
        raise ValueError("x has no dimension; the samples lie along the first: use x[None]")
    if x.dtype not in TYPES:
        raise ValueError(f"x is {x.dtype}; use float32, bfloat16 or float16")
    if not takes(x.device):
        raise ValueError(f"x is on {str(x.device)!r}; the kernels need a GPU (TRITON_INTERPRET=1 "
                         "runs them anywhere, slowly)")
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"x of shape {tuple(x.shape)} has strides {x.stride()}, neither "
                         "contiguous nor channels_last; call .contiguous() on all three tensors")
    for name, t in (("x_adv", x_adv), ("g", g)):
        if (t.shape, t.dtype, t.device) != (x.shape, x.dtype, x.device):
            raise ValueError(f"{name} is {tuple(t.shape)}, {t.dtype}, on {str(t.device)!r}, and x "
                             f"{tuple(x.shape)}, {x.dtype}, on {str(x.device)!r}; make them equal")
        if not same_layout(t, x):
            raise ValueError(f"{name} has strides {t.stride()} and x {x.stride()}; copy it into "
                             "x's layout: torch.empty_like(x).copy_(...)")
    if x_adv.data_ptr() == x.data_ptr() and x.numel():
        raise ValueError("x_adv and x are the same memory, and x must stay; start from x.clone()")
    if not (isinstance(eps, Real) and math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps!r}; give a finite Python number, 0 or more")
    if not (isinstance(alpha, Real) and math.isfinite(alpha)):
        raise ValueError(f"alpha={alpha!r}; give a finite Python number")


def mark_written(x_adv: Tensor) -> None:
    """Tell autograd of the write, as PyTorch's in-place operations do."""
    if not x_adv.is_inference():
        torch.autograd.graph.increment_version(x_adv)


@triton.jit
def clamp(value, low, high):
    return tl.clamp(value, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(value):
    """-1, 0 or 1; 0 for NaN."""
    return (value > 0).to(tl.float32) - (value < 0).to(tl.float32)


@triton.jit
def linf_block(x_adv, g, x, eps, alpha, mask):
    old = read(x_adv, mask)
    clean = read(x, mask).to(tl.float32)
    delta = old.to(tl.float32) - clean + alpha * sign(read(g, mask).to(tl.float32))
    moved = clamp(clean + clamp(delta, -eps, eps), 0.0, 1.0)
    tl.store(x_adv, moved.to(old.dtype), mask)


@triton.jit
def linf_kernel(x_adv, g, x, eps, alpha, length, BLOCK: tl.constexpr):
    """x_adv -> clamp(x + clamp(x_adv - x + alpha sign(g), -eps, eps), 0, 1). Reads x_adv, g, x."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    x_adv, g, x = x_adv + start + offs, g + start + offs, x + start + offs
    if start + BLOCK <= length:
        linf_block(x_adv, g, x, eps, alpha, None)
    else:
        linf_block(x_adv, g, x, eps, alpha, offs < length - start)


def linf_step(x_adv: Tensor, g: Tensor, x: Tensor, eps: float, alpha: float) -> None:
    """x_adv <- clamp(x + clamp(x_adv - x + alpha sign(g), -eps, eps), 0, 1), in place, one launch.

    x_adv, g, x: (N, ...) attacked images, the loss's gradient at them, clean images in [0, 1]; all
    float32, bfloat16 or float16, contiguous or all channels_last. eps: radius of the l_inf ball.
    alpha: step size (negative: descent); both in units of the images.

    Computed in float32, in the order of the formula, rounded once more at the store. As in PyTorch,
    sign(0) = sign(NaN) = 0, so a NaN in g leaves its pixel to the projections alone, and a NaN in
    x_adv or x stays NaN. Raises ValueError for other dtypes or layouts, for tensors that do not
    match, for x_adv in x's memory, and for eps or alpha that are not finite numbers, or eps < 0.
    """
    check(x_adv, g, x, eps, alpha)
    with torch.cuda.device_of(x):
        linf_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x_adv, g, x, float(eps), float(alpha), x.numel(), BLOCK=BLOCK, **OPTIONS)
    mark_written(x_adv)


@triton.jit
def not_zero(value):
    """The value, or 1 for 0: what a zero gradient or perturbation may be divided by."""
    return tl.where(value == 0, 1.0, value)


@triton.jit
def moved_delta(x_adv, g, x, alpha, largest, norm, mask):
    """x_adv - x + alpha (g / largest) / norm of one block, before the projections."""
    delta = read(x_adv, mask).to(tl.float32) - read(x, mask).to(tl.float32)
    return delta + alpha * tl.div_rn(tl.div_rn(read(g, mask).to(tl.float32), largest), norm)


@triton.jit
def l2_kernel(x_adv, g, x, eps, alpha, length, BLOCK: tl.constexpr):
    """d = x_adv - x + alpha g / ||g||;  x_adv -> clamp(x + d min(1, eps / ||d||), 0, 1).

    Per sample, one program each: two sweeps over g, for its largest |g| and for the norm of g
    divided by that, and two over x_adv, g and x. The reductions lie between the sweeps, so nothing
    is written before every thread has read.
    """
    first = tl.program_id(0).to(tl.int64) * length
    x_adv, g, x = x_adv + first, g + first, x + first
    offs = tl.arange(0, BLOCK)
    highest = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, length, BLOCK):
        value = read(g + i + offs, offs < length - i).to(tl.float32)
        highest = tl.maximum(highest, tl.abs(value))
    largest = not_zero(tl.max(highest))
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, length, BLOCK):
        value = tl.div_rn(read(g + i + offs, offs < length - i).to(tl.float32), largest)
        squares += value * value
    g_norm = not_zero(tl.sqrt_rn(tl.sum(squares)))
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, length, BLOCK):
        delta = moved_delta(x_adv + i + offs, g + i + offs, x + i + offs, alpha, largest, g_norm,
                            offs < length - i)
        squares += delta * delta
    norm = tl.sqrt_rn(tl.sum(squares))
    shrink = tl.where(norm <= eps, 1.0, tl.div_rn(eps, not_zero(norm)))  # NaN stays NaN
    for i in range(0, length, BLOCK):
        mask = offs < length - i
        delta = moved_delta(x_adv + i + offs, g + i + offs, x + i + offs, alpha, largest, g_norm,
                            mask)
        moved = clamp(read(x + i + offs, mask).to(tl.float32) + shrink * delta, 0.0, 1.0)
        tl.store(x_adv + i + offs, moved.to(x_adv.dtype.element_ty), mask)


def l2_step(x_adv: Tensor, g: Tensor, x: Tensor, eps: float, alpha: float) -> None:
    """d = x_adv - x + alpha g / ||g||; x_adv <- clamp(x + d min(1, eps / ||d||), 0, 1), in place.

    One launch; the norms are per sample, over all dimensions but the first. g's scale does not
    matter, down to the smallest number of its dtype; a zero gradient moves nothing. Arguments and
    errors as for linf_step; eps is the l2 radius.

    Computed in float32 and rounded once more at the store. The sums have a fixed order, which only
    the layout and the tensors' alignment to 16 bytes change: the same sample gives the same bits,
    whatever else is in the batch. Squares of g are of numbers up to 1, the largest |g| among them,
    so that they neither overflow nor vanish. A NaN anywhere in a sample, or an inf in its g, makes
    the whole sample NaN, as in PyTorch.
    """
    check(x_adv, g, x, eps, alpha)
    with torch.cuda.device_of(x):
        l2_kernel[(len(x),)](
            x_adv, g, x, float(eps), float(alpha), x.numel() // max(1, len(x)),
            BLOCK=SAMPLE_BLOCK, **SAMPLE_OPTIONS)
    mark_written(x_adv)
