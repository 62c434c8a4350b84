"""K1: the partial sums of the ascent direction's squared norm."""

import triton
import triton.language as tl

from .common import (
    ALGORITHM1,
    BLOCK,
    EMA_SHARE,
    FULL,
    GRADIENT,
    HYPER,
    INV_SCALE1,
    LMBDA,
    MODES,
    OFFICIAL,
    OPTIONS,
    PARTIALS,
    PLAIN,
    SCALINGS,
    SIGMA,
    TYPES,
    UNSCALED,
    WEIGHTS,
    launching_on,
    locate,
    pointer,
    read,
    weights,
    wide_pointer,
)


@triton.jit
def direction(g, m, sigma, lmbda, share, MODE: tl.constexpr):
    """The ascent direction d and the new m, from g and m: the average before this step, or the
    given full gradient. In fastsam.reference: `ascent`.

    share is 1 - lmbda, taken before either was rounded.
    """
    new_m = m
    d = g
    if MODE == ALGORITHM1:
        new_m = lmbda * m + share * g
        d = g - sigma * new_m
    elif MODE == FULL:
        d = sigma * m
    elif MODE != PLAIN:
        if MODE == OFFICIAL:
            new_m = lmbda * m + share * g
        d = g - sigma * m
    return d, new_m


@triton.jit
def scaling(w, g, a, b, SCALING: tl.constexpr):
    """T of ASAM or FisherSAM; a = 0 is T = b, which is 1 for the latter."""
    if SCALING == WEIGHTS:
        T = a * tl.abs(w) + b
    else:
        T = tl.div_rn(1.0, tl.sqrt_rn(1.0 + a * g * g))
    return T


@triton.jit
def squares(w_ptr, g_ptr, backup, m, flat, offs, mask, a, b, inv_scale, sigma, lmbda, share,
            MODE: tl.constexpr, SCALING: tl.constexpr, MASTERS: tl.constexpr):
    """(T d)^2 of one block."""
    g = read(g_ptr + offs, mask).to(tl.float32) * inv_scale
    old_m = g
    if MODE != PLAIN:
        old_m = read(m + flat + offs, mask)
    d, _ = direction(g, old_m, sigma, lmbda, share, MODE)
    if SCALING != UNSCALED:
        w = g
        if SCALING != GRADIENT:
            _, w = weights(w_ptr + offs, backup + flat + offs, mask, MASTERS)
        d = scaling(w, g, a, b, SCALING) * d
    return d * d


@triton.jit
def norm_kernel(w_table, g_table, backup, m, partials, blocks, layout, scalings, hyper, control,
                n_blocks, MODE: tl.constexpr, SCALING: tl.constexpr, MASTERS: tl.constexpr,
                TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """partials[p] = sum of (T d)^2 over program p's blocks. Reads g, m (and w for ASAM)."""
    inv_scale = tl.load(control + INV_SCALE1)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        slot, start, flat, length, group = locate(block, blocks, layout, BLOCK)
        g = tl.load(g_table + slot)
        if g != 0:
            w = tl.load(w_table + slot)
            a, b = tl.load(scalings + 2 * slot), tl.load(scalings + 2 * slot + 1)
            row = hyper + group * HYPER
            sigma = tl.load(row + SIGMA)
            lmbda, share = tl.load(row + LMBDA), tl.load(row + EMA_SHARE)
            offs = tl.arange(0, BLOCK)
            if (length >= BLOCK) & ((w | g) % 16 == 0):
                total += squares(wide_pointer(w, TYPE) + start, wide_pointer(g, TYPE) + start,
                                 backup, m, flat, offs, None, a, b, inv_scale, sigma, lmbda,
                                 share, MODE, SCALING, MASTERS)
            else:
                total += squares(pointer(w, TYPE) + start, pointer(g, TYPE) + start,
                                 backup, m, flat, offs, offs < length, a, b, inv_scale, sigma,
                                 lmbda, share, MODE, SCALING, MASTERS)
    tl.store(partials + tl.program_id(0), tl.sum(total))


def norm(space) -> None:
    """space.partials = the parts of ||T d||^2 over the slots that have a first-pass gradient."""
    blocks = space.blocks(BLOCK)
    with launching_on(space):
        norm_kernel[(max(1, min(len(blocks), PARTIALS)),)](
            w_table=space.addresses("w"), g_table=space.addresses("g1"), backup=space.backup,
            m=space.m, partials=space.partials, blocks=blocks, layout=space.layout(),
            scalings=space.scalings(), hyper=space.hyper, control=space.control_buffer,
            n_blocks=len(blocks), MODE=MODES[space.mode], SCALING=SCALINGS[space.scaling],
            MASTERS=space.masters, TYPE=TYPES[space.dtype], BLOCK=BLOCK, **OPTIONS)
