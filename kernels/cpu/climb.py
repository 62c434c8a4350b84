"""The loop of the climb: w is saved and moved, and m brought up to date."""

from functools import lru_cache

import numpy as np
from numba import carray

from fastsam.hyper import FRIENDLY, KEEPING, WITH_M
from fastsam.space import GUARD

from .memory import (
    CHUNK,
    LINE,
    SIZES,
    TILE,
    accumulates_in,
    address_in,
    count_in,
    fence,
    load,
    put_past_caches,
    rounded,
    scratch,
    store,
    take,
    total,
)
from .norm import ascent, scaling, weights
from .tables import (
    ARGUMENTS,
    BLOCK,
    EMA_SHARE,
    G_TABLE,
    INV_SCALE1,
    LMBDA,
    NORM,
    OWN,
    RHO,
    SIGMA,
    STEPS,
    W_TABLE,
    Loop,
    compiled,
    tables_of,
)


@lru_cache
def climb_loop(mode: str | None, kind: str | None, masters: bool, dtype: str, g_dtype: str,
          ) -> Loop:
    """w -> w + e with w saved and m updated, e = rho / (norm + GUARD) T^2 d, or 0 unless `moves`.
    Where the mode keeps the gradient, `m` is the buffer for it. sums[0, b], sums[1, b] = the
    squared length of e in block b, as stored, and as wanted (where rounding to 16 bits can part
    them)."""
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    S = A if masters else W
    size, w_size, g_size, s_size = SIZES[A], SIZES[W], SIZES[G], SIZES[S]
    has_m, keeps, averages = mode in WITH_M, mode in KEEPING, mode in FRIENDLY
    algorithm1, official, full = (mode == x for x in ("algorithm1", "official", "full"))
    by_w, by_g = kind == "weights", kind == "gradient"
    rounds = W in ("bf16", "f16")
    F = np.dtype(A).type
    one, zero, guard = map(F, (1, 0, GUARD))

    @compiled
    def loop(arguments):
        args = carray(arguments, ARGUMENTS)
        blocks, layout, hyper, scalings, control, sums = tables_of(args, F)
        m_steps, w_table, g_table = args[STEPS], args[W_TABLE], args[G_TABLE]
        saved, m, norm = args[OWN], args[OWN + 1], control[NORM]
        moves, past_caches = args[OWN + 2] != 0, args[OWN + 3] != 0
        x, y, z = scratch(A), scratch(A), scratch(A)
        inv_scale = control[INV_SCALE1]
        while True:
            block = len(blocks) - 1 - take(args)  # backwards: what the norm read last is near
            if block < 0:
                break
            slot, first = blocks[block, 0], blocks[block, 1] * BLOCK
            sums[0, block] = 0
            sums[1, block] = 0
            if address_in(g_table, slot) == 0:
                continue
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            a, b, sigma = scalings[slot, 0], scalings[slot, 1], hyper[group, SIGMA]
            lmbda, ema_share = hyper[group, LMBDA], hyper[group, EMA_SHARE]
            scale = one / (norm + guard) * hyper[group, RHO] if moves else zero
            begins = count_in(m_steps, slot) == 0
            for start in range(first, min(end, first + BLOCK), CHUNK):
                n = min(CHUNK, end - start)
                w_at = address_in(w_table, slot) + start * w_size
                g_at = address_in(g_table, slot) + start * g_size
                saved_at, m_at = saved + (offset + start) * s_size, m + (offset + start) * size
                past = past_caches and not masters and saved_at % LINE == 0
                tile = TILE if past else n
                for low in range(0, n, tile):
                    high = min(n, low + tile)
                    saved_to = z - low * s_size if past else saved_at
                    for i in range(low, high):
                        stored, w = weights(w_at, saved_at, i, masters, W, A)
                        g = load(g_at, i, "g", G) * inv_scale
                        d = g
                        if keeps:
                            store(m_at, i, g, "m", A)
                        if has_m:
                            old_m = load(m_at, i, "m", A)
                            d, new_m = ascent(g, old_m, sigma, lmbda, ema_share, algorithm1, full)
                            if averages:
                                if official:
                                    new_m = g if begins else new_m
                                store(m_at, i, new_m, "m", A)
                        if by_w or by_g:
                            T = scaling(w, g, a, b, by_w, one)
                            d = T * (T * d)
                        e = scale * d
                        store(saved_to, i, w, "saved", S)
                        store(w_at, i, w + e, "w", W)
                        new = rounded(w + e, W)
                        length = new - stored if new != stored else zero  # inf - inf is NaN
                        store(x, i, length * length, "x", A)
                        if rounds:
                            store(y, i, e * e, "y", A)
                    if past:
                        put_past_caches(saved_at + low * s_size, z, (high - low) * s_size, "saved")
                part = total(x, n, "x", A)
                sums[0, block] += part
                sums[1, block] += total(y, n, "y", A) if rounds else part
        fence(0)

    return loop
