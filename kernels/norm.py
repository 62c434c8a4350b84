"""K1: the partial sums of the ascent direction's squared norm."""

import triton
import triton.language as tl

from .common import (
    ALGORITHM1,
    BLOCK,
    EMA,
    EMA_SHARE,
    HYPER,
    INV_SCALE1,
    LMBDA,
    NO_EMA,
    OPTIONS,
    PARTIALS,
    SIGMA,
    TYPES,
    launching_on,
    locate,
    pointer,
    read,
    wide_pointer,
)


@triton.jit
def direction(g, m, sigma, lmbda, share, MODE: tl.constexpr):
    """d = g - sigma m with the new m (Algorithm 1) or the m of the step before; and the new m.

    share is 1 - lmbda, taken before either was rounded.
    """
    new_m = m
    d = g
    if MODE != NO_EMA:
        new_m = lmbda * m + share * g
        d = g - sigma * (new_m if MODE == ALGORITHM1 else m)
    return d, new_m


@triton.jit
def squares(w_ptr, g_ptr, m, flat, offs, mask, a, b, inv_scale, sigma, lmbda, share,
            MODE: tl.constexpr, ADAPTIVE: tl.constexpr):
    """(T d)^2 of one block, T = a |w| + b."""
    g = read(g_ptr + offs, mask).to(tl.float32) * inv_scale
    old_m = g
    if MODE != NO_EMA:
        old_m = read(m + flat + offs, mask)
    d, _ = direction(g, old_m, sigma, lmbda, share, MODE)
    if ADAPTIVE:
        w = read(w_ptr + offs, mask).to(tl.float32)
        d = (a * tl.abs(w) + b) * d
    return d * d


@triton.jit
def norm_kernel(w_table, g_table, m, partials, blocks, layout, scalings, hyper, control, n_blocks,
                MODE: tl.constexpr, ADAPTIVE: tl.constexpr, TYPE: tl.constexpr,
                BLOCK: tl.constexpr):
    """partials[p] = sum of (T d)^2 over program p's blocks. Reads g, m (and w for ASAM)."""
    inv_scale = tl.load(control + INV_SCALE1)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        slot, start, flat, length, group = locate(block, blocks, layout, BLOCK)
        g = tl.load(g_table + slot)
        if g != 0:
            w = tl.load(w_table + slot)
            a, b = tl.load(scalings + 2 * slot), tl.load(scalings + 2 * slot + 1)
            sigma = tl.load(hyper + group * HYPER + SIGMA)
            lmbda = tl.load(hyper + group * HYPER + LMBDA)
            share = tl.load(hyper + group * HYPER + EMA_SHARE)
            offs = tl.arange(0, BLOCK)
            if (length >= BLOCK) & ((w | g) % 16 == 0):
                total += squares(wide_pointer(w, TYPE) + start, wide_pointer(g, TYPE) + start,
                                 m, flat, offs, None, a, b, inv_scale, sigma, lmbda, share,
                                 MODE, ADAPTIVE)
            else:
                total += squares(pointer(w, TYPE) + start, pointer(g, TYPE) + start,
                                 m, flat, offs, offs < length, a, b, inv_scale, sigma, lmbda, share,
                                 MODE, ADAPTIVE)
    tl.store(partials + tl.program_id(0), tl.sum(total))


def norm(space) -> None:
    """space.partials = the parts of ||T d||^2 over the slots that have a first-pass gradient."""
    blocks = space.blocks(BLOCK)
    with launching_on(space):
        norm_kernel[(max(1, min(len(blocks), PARTIALS)),)](
            w_table=space.addresses("w"), g_table=space.addresses("g1"), m=space.m,
            partials=space.partials, blocks=blocks, layout=space.layout(),
            scalings=space.scalings(), hyper=space.hyper, control=space.control_buffer,
            n_blocks=len(blocks), MODE=EMA[space.ema], ADAPTIVE=space.adaptive,
            TYPE=TYPES[space.dtype], BLOCK=BLOCK, **OPTIONS)
