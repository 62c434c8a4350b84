"""The loops of the return to the saved weights and the base optimizer's update."""

import math
from functools import lru_cache

import numpy as np
from numba import carray, float64, njit

from .memory import (
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
)
from .norm import squares
from .tables import (
    ALPHA,
    ARGUMENTS,
    BETA1,
    BETA1_SHARE,
    BETA2,
    BETA2_SHARE,
    BLOCK,
    DAMPENING,
    DECOUPLED,
    EPS,
    G_TABLE,
    INV_SCALE2,
    LOG_BETA1,
    LOG_BETA2,
    LR,
    MOMENTUM,
    MOMENTUM_SHARE,
    NESTEROV,
    OWN,
    SHARE,
    STEPS,
    W_TABLE,
    WEIGHT_DECAY,
    Loop,
    compiled,
    tables_of,
)


@njit(inline="always")
def mixed(g, i, m, kept, c, alpha, returns, gsam, renews, reuses, dtype):
    """What the base steps with; stores m where it is renewed. In fastsam.reference: `mixed`."""
    if gsam and returns:
        g = g - alpha * (load(kept, i, "kept", dtype) - c * g)
    if renews and returns:
        store(m, i, g - c * load(kept, i, "kept", dtype), "m", dtype)
    if reuses:
        g = g + alpha * (c * load(m, i, "m", dtype))
    return g


@njit(inline="always")
def sgd_hyper(row, count):
    """What `sgd` takes of a group: lr, weight decay, momentum, 1 - dampening, whether v begins as
    g, and nesterov."""
    return (row[LR], row[WEIGHT_DECAY], row[MOMENTUM], row[MOMENTUM_SHARE],
            count == 0 and row[DAMPENING] != 0, row[NESTEROV] != 0)


@njit(inline="always")
def sgd(w, g, i, v, hyper, has_v, dtype):
    """The new w; stores v where there is one. In fastsam.reference: `sgd`."""
    lr, weight_decay, momentum, momentum_share, begins, nesterov = hyper
    g = g + weight_decay * w if weight_decay != 0 else g
    if has_v:
        old_v = load(v, i, "v", dtype)
        new_v = g if begins else momentum * old_v + momentum_share * g
        store(v, i, new_v if momentum != 0 else old_v, "v", dtype)
        ahead = g + momentum * new_v if nesterov else new_v
        g = ahead if momentum != 0 else g
    return w - lr * g


@njit(inline="always")
def adam_hyper(row, count, F):
    """What `adam` takes of a group: the weight decay of g, the factor of w, beta_i and 1 - beta_i
    in turn, lr / (1 - beta1^t), 1 - beta2^t, and eps."""
    lr, weight_decay, decoupled = row[LR], row[WEIGHT_DECAY], row[DECOUPLED] != 0
    t = F(count + 1)
    c1 = F(-math.expm1(float64(t * row[LOG_BETA1])))
    c2 = F(-math.expm1(float64(t * row[LOG_BETA2])))
    return (F(0) if decoupled else weight_decay,
            F(1 - float64(lr) * float64(weight_decay)) if decoupled else F(1),
            row[BETA1], row[BETA1_SHARE], row[BETA2], row[BETA2_SHARE],
            F(1) / c1 * lr, c2, row[EPS])


@njit(inline="always")
def adam(w, g, i, v, u, hyper, dtype):
    """The new w; stores v and u. In fastsam.reference: `adam`."""
    decay, shrink, beta1, share1, beta2, share2, rate, c2, eps = hyper
    g = g + decay * w if decay != 0 else g
    w = w * shrink
    new_v = beta1 * load(v, i, "v", dtype) + share1 * g
    new_u = beta2 * load(u, i, "u", dtype) + share2 * g * g
    store(v, i, new_v, "v", dtype)
    store(u, i, new_u, "u", dtype)
    return w - rate * new_v / (math.sqrt(new_u / c2) + eps)


@lru_cache
def step_loop(base: str, mix: str | None, along_v: bool, masters: bool, dtype: str, g_dtype: str,
         ) -> Loop:
    """The base optimizer's update from the saved w, where `moved`, or from w; `moved` is the
    address of `Climb.table`, or 0. With along_v, sums[0, b] = ||v||^2 of block b, where `moved`, as
    `norm` adds it up."""
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    S = A if masters else W
    size, w_size, g_size, s_size = SIZES[A], SIZES[W], SIZES[G], SIZES[S]
    F = np.dtype(A).type
    by_adam, has_v = base == "adam", base != "sgd"
    gsam, renews, reuses = (mix == x for x in ("gsam", "renew", "reuse"))

    @compiled
    def loop(arguments):
        args = carray(arguments, ARGUMENTS)
        blocks, layout, hyper, _, control, sums = tables_of(args, F)
        v_steps, w_table, g_table = args[STEPS], args[W_TABLE], args[G_TABLE]
        moved, saved, v, u = args[OWN], args[OWN + 1], args[OWN + 2], args[OWN + 3]
        m, kept, past_caches = args[OWN + 4], args[OWN + 5], args[OWN + 6] != 0
        x = scratch(A)
        inv_scale, c = control[INV_SCALE2], control[SHARE]
        while True:
            block = take(args)
            if block >= len(blocks):
                break
            slot, start = blocks[block, 0], blocks[block, 1] * BLOCK
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            n, here = min(BLOCK, end - start), (offset + start) * size
            v_at, u_at, m_at, kept_at = v + here, u + here, m + here, kept + here
            returns = moved != 0 and address_in(moved, slot) != 0
            if address_in(g_table, slot) != 0:
                alpha, row, count = hyper[group, ALPHA], hyper[group], count_in(v_steps, slot)
                if by_adam:
                    h = adam_hyper(row, count, F)
                else:
                    h = sgd_hyper(row, count)
                w_at = address_in(w_table, slot) + start * w_size
                g_at = address_in(g_table, slot) + start * g_size
                saved_at = saved + (offset + start) * s_size
                old_at = saved_at if returns or masters else w_at
                past = past_caches and returns and not masters and w_at % LINE == 0
                tile = TILE if past else n
                for low in range(0, n, tile):
                    high = min(n, low + tile)
                    w_to = x - low * w_size if past else w_at
                    for i in range(low, high):
                        w = load(old_at, i, "old", S)
                        if masters:
                            stored = load(w_at, i, "w", W)
                            w = w if returns or rounded(w, W) == stored else stored
                        g = load(g_at, i, "g", G) * inv_scale
                        if mix is not None:
                            g = mixed(g, i, m_at, kept_at, c, alpha, returns, gsam, renews,
                                      reuses, A)
                        if by_adam:
                            w = adam(w, g, i, v_at, u_at, h, A)
                        else:
                            w = sgd(w, g, i, v_at, h, has_v, A)
                        store(w_to, i, w, "w", W)
                        if masters:
                            store(saved_at, i, w, "old", A)
                    if past:
                        put_past_caches(w_at + low * w_size, x, (high - low) * w_size, "w")
            if along_v:
                sums[0, block] = squares(v_at, n, size, A) if returns else 0
        fence(0)

    return loop
