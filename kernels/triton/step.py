"""K3: the return to the saved weights and the base optimizer's update, in one pass."""

import triton
import triton.language as tl

from ...passes import Climb, Pass
from .common import (
    ALPHA,
    BETA1,
    BETA1_SHARE,
    BETA2,
    BETA2_SHARE,
    DECOUPLED,
    EPS,
    FOUND_INF,
    GSAM,
    HYPER,
    INV_SCALE2,
    LOG_BETA1,
    LOG_BETA2,
    LR,
    MIXES,
    MOMENTUM,
    MOMENTUM_SHARE,
    NESTEROV,
    OK,
    RENEW,
    REUSE,
    SHARE,
    SKIPPED,
    STEP_TICKET,
    WEIGHT_DECAY,
    is_last_program,
    jit,
    locate,
    pointer,
    read,
    weights,
    wide_pointer,
)
from .launch import launch

BASES = {"sgd": 0, "sgd-momentum": 1, "adam": 2}
SGD, SGD_MOMENTUM, ADAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def sgd(w, g, v, flat, offs, mask, row, count, ok, HAS_MOMENTUM: tl.constexpr):
    """torch.optim.SGD's update of w; stores v. What the reference branches on is data here, except
    whether there is a momentum buffer."""
    g = g + tl.load(row + WEIGHT_DECAY) * w
    if HAS_MOMENTUM:
        momentum, share = tl.load(row + MOMENTUM), tl.load(row + MOMENTUM_SHARE)
        old_v = read(v + flat + offs, mask)
        new_v = tl.where(count == 0, g, momentum * old_v + share * g)
        has_momentum = momentum != 0
        tl.store(v + flat + offs, tl.where(ok & has_momentum, new_v, old_v), mask)
        ahead = tl.where(tl.load(row + NESTEROV) != 0, g + momentum * new_v, new_v)
        g = tl.where(has_momentum, ahead, g)
    return w - tl.load(row + LR) * g


@triton.jit
def one_less_power(log_beta, t):
    """1 - beta^t: where beta^t is near 1 by its series, as the difference would cancel."""
    x = t * log_beta
    series = 1.0 + x / 8 * (1.0 + x / 9)
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * series))
    series = -x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series)))
    return tl.where(x > -0.5, series, 1.0 - tl.exp(x))


@triton.jit
def adam(w, g, v, u, flat, offs, mask, row, count, ok):
    """torch.optim.Adam's update of w, AdamW's where decoupled; stores v and u."""
    lr, weight_decay = tl.load(row + LR), tl.load(row + WEIGHT_DECAY)
    decoupled = tl.load(row + DECOUPLED) != 0
    g = g + tl.where(decoupled, 0.0, weight_decay) * w
    w = w * (1.0 - tl.where(decoupled, lr * weight_decay, 0.0))
    old_v, old_u = read(v + flat + offs, mask), read(u + flat + offs, mask)
    new_v = tl.load(row + BETA1) * old_v + tl.load(row + BETA1_SHARE) * g
    new_u = tl.load(row + BETA2) * old_u + tl.load(row + BETA2_SHARE) * g * g
    tl.store(v + flat + offs, tl.where(ok, new_v, old_v), mask)
    tl.store(u + flat + offs, tl.where(ok, new_u, old_u), mask)
    t = (count + 1).to(tl.float32)
    c1 = one_less_power(tl.load(row + LOG_BETA1), t)
    c2 = one_less_power(tl.load(row + LOG_BETA2), t)
    root = tl.sqrt_rn(tl.div_rn(new_u, c2)) + tl.load(row + EPS)
    return w - tl.div_rn(tl.div_rn(lr, c1) * new_v, root)


@triton.jit
def mixed(g, m, kept, flat, offs, mask, share, row, ok, MIX: tl.constexpr):
    """What the base steps with; stores m where it is renewed. In fastsam.reference: `mixed`."""
    if MIX == GSAM:
        g = g - tl.load(row + ALPHA) * (read(kept + flat + offs, mask) - share * g)
    elif MIX == REUSE:
        g = g + tl.load(row + ALPHA) * (share * read(m + flat + offs, mask))
    elif MIX == RENEW:
        old_m = read(m + flat + offs, mask)
        new_m = g - share * read(kept + flat + offs, mask)
        tl.store(m + flat + offs, tl.where(ok, new_m, old_m), mask)
    return g


@triton.jit
def update(w_ptr, g_ptr, saved, v, u, m, kept, flat, offs, mask, inv_scale, share, row, count, ok,
           CLIMBED: tl.constexpr, BASE: tl.constexpr, MIX: tl.constexpr, MASTERS: tl.constexpr,
           TYPE: tl.constexpr):
    """The base optimizer's update of one block, from the saved w or the one at w_ptr."""
    if CLIMBED:
        old = read(saved + flat + offs, mask)
    else:
        w_in, w32 = weights(w_ptr + offs, saved + flat + offs, mask, MASTERS)
        old = w32 if MASTERS else w_in
    w = old.to(tl.float32)
    g = read(g_ptr + offs, mask).to(tl.float32) * inv_scale
    if CLIMBED or MIX == REUSE:
        g = mixed(g, m, kept, flat, offs, mask, share, row, ok, MIX)
    if BASE == ADAM:
        new = adam(w, g, v, u, flat, offs, mask, row, count, ok)
    else:
        new = sgd(w, g, v, flat, offs, mask, row, count, ok, BASE == SGD_MOMENTUM)
    stored = tl.where(ok, new.to(old.dtype), old)
    tl.store(w_ptr + offs, stored.to(TYPE), mask)
    if MASTERS:
        tl.store(saved + flat + offs, stored, mask)


@jit
def step_kernel(w_table, g_table, climbed_table, saved, v, u, m, kept, blocks, layout, hyper,
                control, counters, v_steps, n_blocks, n_slots, BASE: tl.constexpr,
                MIX: tl.constexpr, PERTURBED: tl.constexpr, MASTERS: tl.constexpr,
                TYPE: tl.constexpr, G_TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """w = base(saved w, g); where there is no g, w = saved w. Reads saved w, v, u, g; writes v, u,
    w.

    Where nothing was saved (it did not climb, or a plain step), w itself is the start. After a
    climb that was not ok, or with found_inf, every block only returns, and the skip is counted.
    """
    inv_scale, share = tl.load(control + INV_SCALE2), tl.load(control + SHARE)
    ok = tl.load(control + FOUND_INF) == 0
    if PERTURBED:
        ok = ok & (tl.load(control + OK) != 0)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        slot, start, flat, length, group = locate(block, blocks, layout, BLOCK)
        w = tl.load(w_table + slot)
        g = tl.load(g_table + slot)
        climbed = False
        if PERTURBED:
            climbed = tl.load(climbed_table + slot) != 0
        offs = tl.arange(0, BLOCK)
        mask = offs < length
        if g != 0:
            row = hyper + group * HYPER
            count = tl.load(v_steps + slot)
            wide = (length >= BLOCK) & ((w | g) % 16 == 0)
            if wide & (climbed == PERTURBED):
                update(wide_pointer(w, TYPE) + start, wide_pointer(g, G_TYPE) + start, saved, v, u,
                       m, kept, flat, offs, None, inv_scale, share, row, count, ok, PERTURBED, BASE,
                       MIX, MASTERS, TYPE)
            else:
                w_ptr, g_ptr = pointer(w, TYPE) + start, pointer(g, G_TYPE) + start
                if climbed:
                    update(w_ptr, g_ptr, saved, v, u, m, kept, flat, offs, mask, inv_scale, share,
                           row, count, ok, True, BASE, MIX, MASTERS, TYPE)
                else:
                    update(w_ptr, g_ptr, saved, v, u, m, kept, flat, offs, mask, inv_scale, share,
                           row, count, ok, False, BASE, MIX, MASTERS, TYPE)
        elif climbed:
            back = tl.load(saved + flat + offs, mask).to(TYPE)
            tl.store(pointer(w, TYPE) + start + offs, back, mask)
    if is_last_program(counters + STEP_TICKET):
        tl.store(counters + SKIPPED, tl.load(counters + SKIPPED) + (ok == 0).to(tl.int32))
        for i in range(0, n_slots, 128):
            slots = i + tl.arange(0, 128)
            mask = slots < n_slots
            count = tl.load(v_steps + slots, mask, 0)
            moved = tl.load(g_table + slots, mask, 0) != 0
            if BASE != ADAM:
                group = tl.load(layout + 3 * slots + 2, mask, 0)
                moved = moved & (tl.load(hyper + group * HYPER + MOMENTUM) != 0)
            tl.store(v_steps + slots, count + moved.to(tl.int32) * ok.to(tl.int32), mask)


def step(p: Pass, climb: Climb | None) -> None:
    """The base optimizer from the saved w (from w itself where nothing was saved) with p.g."""
    climbed = None if climb is None else climb.table
    launch(step_kernel, p, (p.w_table, p.g_table, climbed), step_arguments, climb is not None,
           MIXES[p.mix])


def step_arguments(p: Pass, perturbed: bool, mix: int) -> dict:
    space = p.space
    m = space.m if mix else None
    return dict(saved=space.saved, v=space.v, u=space.u, m=m, kept=space.kept,
                counters=space.counters, v_steps=space.steps[1], n_slots=len(space.slots),
                BASE=BASES[space.kind.base], MIX=mix, PERTURBED=perturbed,
                MASTERS=space.kind.masters)
