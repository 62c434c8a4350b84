"""The loops of the return to the saved weights and the base optimizer's update."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numba import float64, int64, njit

from .memory import SIZES, accumulates_in, load, rounded, store, take
from .norm import squares
from .tables import (
    ALPHA,
    BETA1,
    BETA1_SHARE,
    BETA2,
    BETA2_SHARE,
    BLOCK,
    DAMPENING,
    DECOUPLED,
    EPS,
    INV_SCALE2,
    LOG_BETA1,
    LOG_BETA2,
    LR,
    MOMENTUM,
    MOMENTUM_SHARE,
    NESTEROV,
    SHARE,
    WEIGHT_DECAY,
    compiled,
    tables,
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


@lru_cache
def step_loop(base: str, mix: str | None, along_v: bool, masters: bool, dtype: str, g_dtype: str,
         ) -> Callable:
    """The base optimizer's update from the saved w, where `moved`, or from w. With along_v,
    sums[0, b] = ||v||^2 of block b, where `moved`, as `norm` adds it up."""
    return (adam if base == "adam" else sgd)(base, mix, along_v, masters, dtype, g_dtype)


def sgd(base: str, mix: str | None, along_v: bool, masters: bool, dtype: str, g_dtype: str,
        ) -> Callable:
    """In fastsam.reference: `sgd`."""
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    S = A if masters else W
    size, w_size, g_size, s_size = SIZES[A], SIZES[W], SIZES[G], SIZES[S]
    has_v = base == "sgd-momentum"
    gsam, renews, reuses = (mix == x for x in ("gsam", "renew", "reuse"))

    @compiled(*tables(dtype), int64[::1], int64, int64, int64, int64, int64, float64[:, ::1])
    def loop(ticket, blocks, layout, hyper, scalings, control, v_steps, w_table, g_table, moved,
             saved, v, u, m, kept, sums):
        inv_scale, c = control[INV_SCALE2], control[SHARE]
        while True:
            block = take(ticket)
            if block >= len(blocks):
                break
            slot, start = blocks[block, 0], blocks[block, 1] * BLOCK
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            n, v_at = min(BLOCK, end - start), v + (offset + start) * size
            if along_v:
                sums[0, block] = 0
            if g_table[slot] == 0:
                if along_v and moved[slot] != 0:
                    sums[0, block] = squares(v_at, n, size, A)
                continue
            lr, weight_decay = hyper[group, LR], hyper[group, WEIGHT_DECAY]
            momentum, momentum_share = hyper[group, MOMENTUM], hyper[group, MOMENTUM_SHARE]
            begins = v_steps[slot] == 0 and hyper[group, DAMPENING] != 0
            nesterov = hyper[group, NESTEROV] != 0
            w_at, g_at = w_table[slot] + start * w_size, g_table[slot] + start * g_size
            saved_at = saved + (offset + start) * s_size
            returns = moved[slot] != 0
            old_at = saved_at if returns or masters else w_at
            alpha = hyper[group, ALPHA]
            m_at, kept_at = m + (offset + start) * size, kept + (offset + start) * size
            for i in range(n):
                w = load(old_at, i, "old", S)
                if masters:
                    stored = load(w_at, i, "w", W)
                    w = w if returns or rounded(w, W) == stored else stored
                g = load(g_at, i, "g", G) * inv_scale
                if mix is not None:
                    g = mixed(g, i, m_at, kept_at, c, alpha, returns, gsam, renews, reuses, A)
                g = g + weight_decay * w if weight_decay != 0 else g
                if has_v:
                    old_v = load(v_at, i, "v", A)
                    new_v = g if begins else momentum * old_v + momentum_share * g
                    store(v_at, i, new_v if momentum != 0 else old_v, "v", A)
                    ahead = g + momentum * new_v if nesterov else new_v
                    g = ahead if momentum != 0 else g
                w = w - lr * g
                store(w_at, i, w, "w", W)
                if masters:
                    store(saved_at, i, w, "old", A)
            if along_v and returns:
                sums[0, block] = squares(v_at, n, size, A)

    return loop


def adam(base: str, mix: str | None, along_v: bool, masters: bool, dtype: str, g_dtype: str,
         ) -> Callable:
    """In fastsam.reference: `adam`."""
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    S = A if masters else W
    size, w_size, g_size, s_size = SIZES[A], SIZES[W], SIZES[G], SIZES[S]
    F = np.dtype(A).type
    gsam, renews, reuses = (mix == x for x in ("gsam", "renew", "reuse"))

    @compiled(*tables(dtype), int64[::1], int64, int64, int64, int64, int64, float64[:, ::1])
    def loop(ticket, blocks, layout, hyper, scalings, control, v_steps, w_table, g_table, moved,
             saved, v, u, m, kept, sums):
        inv_scale, c = control[INV_SCALE2], control[SHARE]
        while True:
            block = take(ticket)
            if block >= len(blocks):
                break
            slot, start = blocks[block, 0], blocks[block, 1] * BLOCK
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            n, v_at = min(BLOCK, end - start), v + (offset + start) * size
            if along_v:
                sums[0, block] = 0
            if g_table[slot] == 0:
                if along_v and moved[slot] != 0:
                    sums[0, block] = squares(v_at, n, size, A)
                continue
            lr, weight_decay, eps = hyper[group, LR], hyper[group, WEIGHT_DECAY], hyper[group, EPS]
            beta1, share1 = hyper[group, BETA1], hyper[group, BETA1_SHARE]
            beta2, share2 = hyper[group, BETA2], hyper[group, BETA2_SHARE]
            decoupled = hyper[group, DECOUPLED] != 0
            t = F(v_steps[slot] + 1)
            c1 = F(-math.expm1(float64(t * hyper[group, LOG_BETA1])))
            c2 = F(-math.expm1(float64(t * hyper[group, LOG_BETA2])))
            rate = F(1) / c1 * lr
            shrink = F(1 - float64(lr) * float64(weight_decay)) if decoupled else F(1)
            adds = weight_decay != 0 and not decoupled
            w_at, g_at = w_table[slot] + start * w_size, g_table[slot] + start * g_size
            saved_at = saved + (offset + start) * s_size
            u_at = u + (offset + start) * size
            returns = moved[slot] != 0
            old_at = saved_at if returns or masters else w_at
            alpha = hyper[group, ALPHA]
            m_at, kept_at = m + (offset + start) * size, kept + (offset + start) * size
            for i in range(n):
                w = load(old_at, i, "old", S)
                if masters:
                    stored = load(w_at, i, "w", W)
                    w = w if returns or rounded(w, W) == stored else stored
                g = load(g_at, i, "g", G) * inv_scale
                if mix is not None:
                    g = mixed(g, i, m_at, kept_at, c, alpha, returns, gsam, renews, reuses, A)
                g = g + weight_decay * w if adds else g
                w = w * shrink
                new_v = beta1 * load(v_at, i, "v", A) + share1 * g
                new_u = beta2 * load(u_at, i, "u", A) + share2 * g * g
                store(v_at, i, new_v, "v", A)
                store(u_at, i, new_u, "u", A)
                w = w - rate * new_v / (math.sqrt(new_u / c2) + eps)
                store(w_at, i, w, "w", W)
                if masters:
                    store(saved_at, i, w, "old", A)
            if along_v and returns:
                sums[0, block] = squares(v_at, n, size, A)

    return loop
