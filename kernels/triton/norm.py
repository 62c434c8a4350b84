"""K1: the partial sums of the ascent direction's squared norm. And K0, of inner products: of g and
m where the projection is not a constant, of g' and what was kept for GSAM and LookSAM."""

import triton
import triton.language as tl

from ...passes import Pass
from ...space import PARTIALS
from .common import (
    ALGORITHM1,
    BLOCK,
    EMA_SHARE,
    FULL,
    GRADIENT,
    HYPER,
    INV_SCALE1,
    INV_SCALE2,
    KEPT,
    LMBDA,
    MIXES,
    MODES,
    OFFICIAL,
    PLAIN,
    SCALINGS,
    SIGMA,
    SUMS,
    UNSCALED,
    WEIGHTS,
    folded,
    from_element,
    in_fours,
    jit,
    pointer,
    read,
    run_of_blocks,
    share_of_blocks,
    store_sum,
    weights,
    wide_place,
    wide_pointer,
)
from .launch import launch


@triton.jit
def ascent(g, m, sigma, lmbda, ema_share, MODE: tl.constexpr):
    """The ascent direction d and the new m, from g and m: the average before this step, or the
    given full gradient. In fastsam.reference: `ascent`.

    ema_share is 1 - lmbda, taken before either was rounded.
    """
    new_m = m
    d = g
    if MODE == ALGORITHM1:
        new_m = lmbda * m + ema_share * g
        d = g - sigma * new_m
    elif MODE == FULL:
        d = sigma * m
    elif MODE > PLAIN:
        if MODE == OFFICIAL:
            new_m = lmbda * m + ema_share * g
        d = g - sigma * m
    return d, new_m


@triton.jit
def scaling(w, g, a, b, SCALING: tl.constexpr):
    """T of ASAM or FisherSAM. A slot with a = 0, which is not adaptive, has T = b or T = 1."""
    if SCALING == WEIGHTS:
        T = tl.where(a != 0, a * tl.abs(w) + b, b)  # of a bias that is infinite, too
    else:
        T = tl.div_rn(1.0, tl.sqrt_rn(1.0 + a * g * g))
    return T


@triton.jit
def squares(w, g, saved, m, flat, offs, mask, a, b, inv_scale, sigma, lmbda, ema_share,
            MODE: tl.constexpr, SCALING: tl.constexpr, MASTERS: tl.constexpr):
    """(T d)^2 and (T g)^2 of one block, which lies at w, g and flat."""
    g = read(g + offs, mask).to(tl.float32) * inv_scale
    old_m = g
    if MODE > PLAIN:
        old_m = read(m + flat + offs, mask)
    d, _ = ascent(g, old_m, sigma, lmbda, ema_share, MODE)
    if SCALING != UNSCALED:
        w32 = g
        if SCALING != GRADIENT:
            _, w32, _ = weights(w + offs, saved + flat + offs, mask, MASTERS)
        T = scaling(w32, g, a, b, SCALING)
        d, g = T * d, T * g
    return d * d, g * g


def block_of(mode: int, scaling: int, narrow: bool, along_v: bool = False) -> int:
    """Elements of K1's blocks: the less is read of each, the more are on their way at once. Along
    v they are K3's, which leaves the same sums.

    Args:
        narrow: gradients, and weights without masters, have 16 bits.
    """
    if along_v:
        return BLOCK
    most = 8 if narrow and not mode and scaling != SCALINGS["gradient"] else 4
    return most * BLOCK >> bool(mode) + bool(scaling)


@jit
def norm_kernel(w_table, g_table, saved, m, partials, blocks, layout, scalings, hyper, control,
                n_blocks, MODE: tl.constexpr, SCALING: tl.constexpr, MASTERS: tl.constexpr,
                TYPE: tl.constexpr, G_TYPE: tl.constexpr, BLOCK: tl.constexpr,
                PARTIALS: tl.constexpr):
    """partials[0, p] = sum of (T d)^2 over program p's blocks; with a mode, partials[1, p] = that
    of (T g)^2. Reads g, m (and w for ASAM)."""
    inv_scale = tl.load(control + INV_SCALE1)
    of_d = tl.zeros((SUMS,), tl.float32)
    few_of_d = tl.zeros((SUMS,), tl.float32)
    of_g = tl.zeros((SUMS,), tl.float32)
    few_of_g = tl.zeros((SUMS,), tl.float32)
    offs, few = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    block, last = share_of_blocks(n_blocks)
    while block < last:
        slot, group, begin, flat, size, n = run_of_blocks(block, last, blocks, layout, BLOCK)
        block += n
        g = tl.load(g_table + slot)
        if g != 0:
            w = from_element(tl.load(w_table + slot), begin, TYPE)
            g = from_element(g, begin, G_TYPE)
            a, b = tl.load(scalings + 2 * slot), tl.load(scalings + 2 * slot + 1)
            row = hyper + group * HYPER
            sigma = tl.load(row + SIGMA)
            lmbda, ema_share = tl.load(row + LMBDA), tl.load(row + EMA_SHARE)
            fours = in_fours(size, w | g if SCALING == WEIGHTS else g)
            wide = wide_place(flat)
            for i in range(0, fours, BLOCK):
                x, y = squares(wide_pointer(w, TYPE) + i, wide_pointer(g, G_TYPE) + i, saved, m,
                               wide + i, offs, offs < fours - i, a, b, inv_scale, sigma, lmbda,
                               ema_share, MODE, SCALING, MASTERS)
                of_d += folded(x, SUMS)
                if MODE > PLAIN:
                    of_g += folded(y, SUMS)
            for i in range(fours, size, BLOCK // 2):
                x, y = squares(pointer(w, TYPE) + i, pointer(g, G_TYPE) + i, saved, m, flat + i,
                               few, few < size - i, a, b, inv_scale, sigma, lmbda, ema_share, MODE,
                               SCALING, MASTERS)
                few_of_d += folded(x, SUMS)
                if MODE > PLAIN:
                    few_of_g += folded(y, SUMS)
    store_sum(partials, tl.sum(of_d) + tl.sum(few_of_d), PARTIALS)
    if MODE > PLAIN:
        store_sum(partials + PARTIALS, tl.sum(of_g) + tl.sum(few_of_g), PARTIALS)


def norm(p: Pass) -> None:
    """space.partials = the parts of ||T d||^2, and with a mode of ||T g||^2."""
    launch(norm_kernel, p, (p.w_table, p.g_table), norm_arguments, p.along_v)


def norm_arguments(p: Pass, along_v: bool) -> dict:
    space = p.space
    mode = MODES[None if space.kept is not None else space.kind.mode]  # K2 keeps, not K1
    narrow = p.g_dtype.itemsize == space.saved.element_size() == 2
    block = block_of(mode, SCALINGS[p.scaling], narrow, along_v)
    return dict(saved=space.saved, m=space.m, partials=space.partials, scalings=space.scalings,
                MODE=mode, SCALING=SCALINGS[p.scaling], MASTERS=space.kind.masters,
                PARTIALS=PARTIALS, BLOCK=block)


@triton.jit
def products(g, m, offs, mask, inv_scale, lmbda, ema_share, MODE: tl.constexpr):
    """g m, g^2 and m^2 of one block, with the m of the projection: ALGORITHM1's is the new one."""
    g = read(g + offs, mask).to(tl.float32) * inv_scale
    m = read(m + offs, mask)
    if MODE == ALGORITHM1:
        m = lmbda * m + ema_share * g
    return g * m, g * g, m * m


@jit
def dots_kernel(g_table, m, dots, blocks, layout, hyper, control, n_blocks,
                MODE: tl.constexpr, TYPE: tl.constexpr, G_TYPE: tl.constexpr,
                BLOCK: tl.constexpr, PARTIALS: tl.constexpr):
    """dots[:, p] = the sums of g m, g^2 and m^2 over program p's blocks. Reads g, m.

    With KEPT it is of a second pass: g is its gradient, and m LookSAM's m or the kept gradient.
    """
    inv_scale = tl.load(control + (INV_SCALE2 if MODE == KEPT else INV_SCALE1))
    gm = tl.zeros((SUMS,), tl.float32)
    few_gm = tl.zeros((SUMS,), tl.float32)
    gg = tl.zeros((SUMS,), tl.float32)
    few_gg = tl.zeros((SUMS,), tl.float32)
    mm = tl.zeros((SUMS,), tl.float32)
    few_mm = tl.zeros((SUMS,), tl.float32)
    offs, few = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    block, last = share_of_blocks(n_blocks)
    while block < last:
        slot, group, begin, flat, size, n = run_of_blocks(block, last, blocks, layout, BLOCK)
        block += n
        g = tl.load(g_table + slot)
        if g != 0:
            g = from_element(g, begin, G_TYPE)
            row = hyper + group * HYPER
            lmbda, ema_share = tl.load(row + LMBDA), tl.load(row + EMA_SHARE)
            fours = in_fours(size, g)
            wide = wide_place(flat)
            for i in range(0, fours, BLOCK):
                x, y, z = products(wide_pointer(g, G_TYPE) + i, m + wide + i, offs,
                                   offs < fours - i, inv_scale, lmbda, ema_share, MODE)
                gm += folded(x, SUMS)
                gg += folded(y, SUMS)
                mm += folded(z, SUMS)
            for i in range(fours, size, BLOCK // 2):
                x, y, z = products(pointer(g, G_TYPE) + i, m + flat + i, few,
                                   few < size - i, inv_scale, lmbda, ema_share, MODE)
                few_gm += folded(x, SUMS)
                few_gg += folded(y, SUMS)
                few_mm += folded(z, SUMS)
    store_sum(dots, tl.sum(gm) + tl.sum(few_gm), PARTIALS)
    store_sum(dots + PARTIALS, tl.sum(gg) + tl.sum(few_gg), PARTIALS)
    store_sum(dots + 2 * PARTIALS, tl.sum(mm) + tl.sum(few_mm), PARTIALS)


def dots(p: Pass) -> None:
    """space.dots = the parts of <g, m>, <g, g> and <m, m>. m is that of the projection; in a second
    pass with a `mix`, the kept gradient, or m."""
    launch(dots_kernel, p, (p.g_table,), dots_arguments, MIXES[p.mix])


def dots_arguments(p: Pass, mix: int) -> dict:
    space = p.space
    m = space.kept if p.mix in ("gsam", "renew") else space.m
    return dict(m=m, dots=space.dots, MODE=MODES[space.kind.mode], PARTIALS=PARTIALS)
