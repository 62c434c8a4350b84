"""The loops of norms: over g, m and w, into sums of each block."""

import math
from functools import lru_cache

import numpy as np
from numba import carray, njit

from fastsam.hyper import KEEPING, WITH_M

from .memory import (
    CHUNK,
    SIZES,
    accumulates_in,
    address_in,
    load,
    rounded,
    scratch,
    store,
    take,
    total,
)
from .tables import (
    ARGUMENTS,
    BLOCK,
    EMA_SHARE,
    G_TABLE,
    INV_SCALE1,
    INV_SCALE2,
    LMBDA,
    OWN,
    SIGMA,
    W_TABLE,
    Loop,
    compiled,
    tables_of,
)


@njit(inline="always")
def weights(w, saved, i, masters, W, A):
    """Element i of w as it is stored, and w: its master where there are masters, unless someone
    else has written another w since."""
    stored = load(w, i, "w", W)
    new = stored
    if masters:
        master = load(saved, i, "saved", A)
        new = master if rounded(master, W) == stored else stored
    return stored, new


@njit(inline="always")
def ascent(g, m, sigma, lmbda, ema_share, algorithm1, full):
    """d, before T, and the new m. In fastsam.reference: `ema` and `direction`."""
    new_m = lmbda * m + ema_share * g
    mean = new_m if algorithm1 else m
    return sigma * mean if full else g - sigma * mean, new_m


@njit(inline="always")
def scaling(w, g, a, b, by_w, one):
    """T. In fastsam.reference: `scaling`."""
    if by_w:
        return a * abs(w) + b if a != 0 else b
    return one / math.sqrt(one + a * g * g)


@lru_cache
def dots_loop(mode: str, dtype: str, g_dtype: str) -> Loop:
    """sums[:, b] = <g, m>, <g, g> and <m, m> of block b. m is that of the projection; where the
    mode keeps a gradient, this is of a second pass, and `m` the x of fastsam.reference.share."""
    G, A = g_dtype, accumulates_in(dtype)
    F, size, g_size = np.dtype(A).type, SIZES[A], SIZES[G]
    algorithm1 = mode == "algorithm1"
    cell = INV_SCALE2 if mode in KEEPING else INV_SCALE1

    @compiled
    def loop(arguments):
        args = carray(arguments, ARGUMENTS)
        blocks, layout, hyper, _, control, sums = tables_of(args, F)
        g_table, m = args[G_TABLE], args[OWN]
        x, y, z = scratch(A), scratch(A), scratch(A)
        inv_scale = control[cell]
        while True:
            block = take(args)
            if block >= len(blocks):
                break
            slot, first = blocks[block, 0], blocks[block, 1] * BLOCK
            sums[:, block] = 0
            if address_in(g_table, slot) == 0:
                continue
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            lmbda, ema_share = hyper[group, LMBDA], hyper[group, EMA_SHARE]
            for start in range(first, min(end, first + BLOCK), CHUNK):
                n = min(CHUNK, end - start)
                g_at = address_in(g_table, slot) + start * g_size
                m_at = m + (offset + start) * size
                for i in range(n):
                    g = load(g_at, i, "g", G) * inv_scale
                    old = load(m_at, i, "m", A)
                    mean = lmbda * old + ema_share * g if algorithm1 else old
                    store(x, i, g * mean, "x", A)
                    store(y, i, g * g, "y", A)
                    store(z, i, mean * mean, "z", A)
                sums[0, block] += total(x, n, "x", A)
                sums[1, block] += total(y, n, "y", A)
                sums[2, block] += total(z, n, "z", A)

    return loop


@njit(inline="always")
def squares(v, n, size, dtype):
    """||v||^2 of n elements, in the order of `norm`."""
    x, length = scratch(dtype), 0.0
    for start in range(0, n, CHUNK):
        part = min(CHUNK, n - start)
        for i in range(part):
            old = load(v + start * size, i, "v", dtype)
            store(x, i, old * old, "x", dtype)
        length += total(x, part, "x", dtype)
    return length


@lru_cache
def norm_loop(mode: str | None, kind: str | None, masters: bool, dtype: str, g_dtype: str,
         ) -> Loop:
    """sums[0, b] = ||T d||^2 of block b; where d is made with m also sums[1, b] = ||T g||^2."""
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    size, w_size, g_size = SIZES[A], SIZES[W], SIZES[G]
    has_m, algorithm1, full = mode in WITH_M, mode == "algorithm1", mode == "full"
    by_w, by_g = kind == "weights", kind == "gradient"
    F = np.dtype(A).type
    one = F(1)

    @compiled
    def loop(arguments):
        args = carray(arguments, ARGUMENTS)
        blocks, layout, hyper, scalings, control, sums = tables_of(args, F)
        w_table, g_table, saved, m = args[W_TABLE], args[G_TABLE], args[OWN], args[OWN + 1]
        x, y = scratch(A), scratch(A)
        inv_scale = control[INV_SCALE1]
        while True:
            block = take(args)
            if block >= len(blocks):
                break
            slot, first = blocks[block, 0], blocks[block, 1] * BLOCK
            sums[0, block] = 0
            sums[1, block] = 0
            if address_in(g_table, slot) == 0:
                continue
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            a, b, sigma = scalings[slot, 0], scalings[slot, 1], hyper[group, SIGMA]
            lmbda, ema_share = hyper[group, LMBDA], hyper[group, EMA_SHARE]
            for start in range(first, min(end, first + BLOCK), CHUNK):
                n = min(CHUNK, end - start)
                w_at = address_in(w_table, slot) + start * w_size
                g_at = address_in(g_table, slot) + start * g_size
                saved_at, m_at = saved + (offset + start) * size, m + (offset + start) * size
                for i in range(n):
                    g = load(g_at, i, "g", G) * inv_scale
                    d = g
                    if has_m:
                        old_m = load(m_at, i, "m", A)
                        d, _ = ascent(g, old_m, sigma, lmbda, ema_share, algorithm1, full)
                    if by_w or by_g:
                        w = g
                        if by_w:
                            _, w = weights(w_at, saved_at, i, masters, W, A)
                        T = scaling(w, g, a, b, by_w, one)
                        d = T * d
                        g = T * g
                    store(x, i, d * d, "x", A)
                    if has_m:
                        store(y, i, g * g, "y", A)
                sums[0, block] += total(x, n, "x", A)
                if has_m:
                    sums[1, block] += total(y, n, "y", A)

    return loop
