"""K3: the return to the saved weights and the base optimizer's update, in one pass."""

import triton
import triton.language as tl

from ...passes import Climb, Pass
from ...space import PARTIALS
from .common import (
    ALPHA,
    BETA1,
    BETA1_SHARE,
    BETA2,
    BETA2_SHARE,
    BLOCK,
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
    SUMS,
    UNMIXED,
    WEIGHT_DECAY,
    folded,
    from_element,
    in_fours,
    is_last_program,
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

BASES = {"sgd": 0, "sgd-momentum": 1, "adam": 2}
SGD, SGD_MOMENTUM, ADAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def sgd(w, g, v, mask, hyper, count, ok, HAS_MOMENTUM: tl.constexpr):
    """torch.optim.SGD's update of w, and the v that it stores. What the reference branches on is
    data here, except whether there is a momentum buffer."""
    lr, weight_decay, momentum, momentum_share, nesterov = hyper
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)  # 0 times an infinite w is NaN
    stored = g
    if HAS_MOMENTUM:
        old_v = read(v, mask)
        begins = (count == 0) & (momentum_share != 1)  # else the formula gives g, from a v of 0
        new_v = tl.where(begins, g, momentum * old_v + momentum_share * g)
        has_momentum = momentum != 0
        stored = tl.where(ok & has_momentum, new_v, old_v)
        tl.store(v, stored, mask)
        ahead = tl.where(nesterov != 0, g + momentum * new_v, new_v)
        g = tl.where(has_momentum, ahead, g)
    return w - lr * g, stored


@triton.jit
def sgd_hyper(row):
    """What `sgd` takes of a group: lr, weight decay, momentum, 1 - dampening, and nesterov."""
    return (tl.load(row + LR), tl.load(row + WEIGHT_DECAY), tl.load(row + MOMENTUM),
            tl.load(row + MOMENTUM_SHARE), tl.load(row + NESTEROV))


@triton.jit
def one_less_power(log_beta, t):
    """1 - beta^t: where beta^t is near 1 by its series, as the difference would cancel."""
    x = t * log_beta
    series = 1.0 + x / 8 * (1.0 + x / 9)
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * series))
    series = -x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series)))
    return tl.where(x > -0.5, series, 1.0 - tl.exp(x))


@triton.jit
def adam(w, g, v, u, mask, hyper, ok):
    """torch.optim.Adam's update of w, AdamW's where decoupled, and the v that it stores; stores u
    too."""
    decay, shrink, beta1, share1, beta2, share2, rate, c2, eps = hyper
    g = tl.where(decay != 0, g + decay * w, g)
    w = w * shrink
    old_v, old_u = read(v, mask), read(u, mask)
    new_v = beta1 * old_v + share1 * g
    new_u = beta2 * old_u + share2 * g * g
    stored = tl.where(ok, new_v, old_v)
    tl.store(v, stored, mask)
    tl.store(u, tl.where(ok, new_u, old_u), mask)
    return w - tl.div_rn(rate * new_v, tl.sqrt_rn(tl.div_rn(new_u, c2)) + eps), stored


@triton.jit
def adam_hyper(row, count):
    """What `adam` takes of a group: the weight decay of g, the factor of w, beta_i and 1 - beta_i
    in turn, lr / (1 - beta1^t), 1 - beta2^t, and eps."""
    lr, weight_decay = tl.load(row + LR), tl.load(row + WEIGHT_DECAY)
    decoupled = tl.load(row + DECOUPLED) != 0
    t = (count + 1).to(tl.float32)
    c1 = one_less_power(tl.load(row + LOG_BETA1), t)
    c2 = one_less_power(tl.load(row + LOG_BETA2), t)
    return (tl.where(decoupled, 0.0, weight_decay),
            1.0 - tl.where(decoupled, lr * weight_decay, 0.0),
            tl.load(row + BETA1), tl.load(row + BETA1_SHARE),
            tl.load(row + BETA2), tl.load(row + BETA2_SHARE),
            tl.div_rn(lr, c1), c2, tl.load(row + EPS))


@triton.jit
def mixed(g, m, kept, flat, offs, mask, c, alpha, climbed, ok, MIX: tl.constexpr):
    """What the base steps with; stores m where it is renewed. In fastsam.reference: `mixed`."""
    if MIX == GSAM:
        g = tl.where(climbed, g - alpha * (read(kept + flat + offs, mask) - c * g), g)
    elif MIX == REUSE:
        g = g + alpha * (c * read(m + flat + offs, mask))
    elif MIX == RENEW:
        at = flat + offs  # one address less than by m + flat and kept + flat: 80 registers are full
        new_m = g - c * read(kept + at, mask)
        tl.store(m + at, new_m, mask & (climbed & ok))
    return g


@triton.jit
def start(w, saved, mask, climbed, MASTERS: tl.constexpr):
    """The w that the step starts from: the saved one where it climbed, else the one at w, or its
    master."""
    if MASTERS:
        _, unmoved, _ = weights(w, saved, mask, MASTERS)
        old = tl.where(climbed, read(saved, mask), unmoved)
    else:
        old = read(tl.where(climbed, saved, w), mask)
    return old


@triton.jit
def update(w, g, saved, v, u, m, kept, flat, offs, mask, inv_scale, c, alpha, hyper, count,
           climbed, ok, BASE: tl.constexpr, MIX: tl.constexpr, MASTERS: tl.constexpr,
           TYPE: tl.constexpr):
    """The base optimizer's update of one block, which lies at w, g and flat. Returns the squares of
    the v that it stores."""
    w, saved = w + offs, saved + flat + offs
    old = start(w, saved, mask, climbed, MASTERS)
    w32 = old.to(tl.float32)
    g = read(g + offs, mask).to(tl.float32) * inv_scale
    if MIX != UNMIXED:
        g = mixed(g, m, kept, flat, offs, mask, c, alpha, climbed, ok, MIX)
    if BASE == ADAM:
        new, v = adam(w32, g, v + flat + offs, u + flat + offs, mask, hyper, ok)
    elif BASE == SGD_MOMENTUM:
        new, v = sgd(w32, g, v + flat + offs, mask, hyper, count, ok, True)
    else:
        new, v = sgd(w32, g, v, mask, hyper, count, ok, False)
    stored = tl.where(ok, new.to(old.dtype), old)
    tl.store(w, stored.to(TYPE), mask)
    if MASTERS:
        tl.store(saved, stored, mask)
    return v * v


@triton.jit
def add_squares(v, wide, flat, begin, whole, size, of_v, few_of_v, BLOCK: tl.constexpr):
    """The sums of v^2 with what is not in them yet of a run of blocks, from `begin` on, in the
    order of the norm."""
    offs, few = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    for i in range(begin, whole, BLOCK):
        x = read(v + wide + i + offs, offs < whole - i)
        of_v += folded(x * x, SUMS)
    for i in range(whole, size, BLOCK // 2):
        x = read(v + flat + i + few, few < size - i)
        few_of_v += folded(x * x, SUMS)
    return of_v, few_of_v


@triton.jit
def count_steps(g_table, layout, hyper, v_steps, n_slots, ok, BASE: tl.constexpr):
    """Count a step of each slot whose v it has moved."""
    for i in range(0, n_slots, 128):
        slots = i + tl.arange(0, 128)
        mask = slots < n_slots
        count = tl.load(v_steps + slots, mask, 0)
        moved = tl.load(g_table + slots, mask, 0) != 0
        if BASE != ADAM:
            group = tl.load(layout + 3 * slots + 2, mask, 0)
            moved = moved & (tl.load(hyper + group * HYPER + MOMENTUM) != 0)
        tl.store(v_steps + slots, count + moved.to(tl.int32) * ok.to(tl.int32), mask)


@jit
def step_kernel(w_table, g_table, climbed_table, saved, v, u, m, kept, partials, blocks, layout,
                hyper, control, counters, v_steps, n_blocks, n_slots, BASE: tl.constexpr,
                MIX: tl.constexpr, PERTURBED: tl.constexpr, ALONG_V: tl.constexpr,
                MASTERS: tl.constexpr, TYPE: tl.constexpr, G_TYPE: tl.constexpr,
                BLOCK: tl.constexpr, PARTIALS: tl.constexpr):
    """w = base(saved w, g); where there is no g, w = saved w. Reads saved w, v, u, g; writes v, u,
    w.

    Where nothing was saved (it did not climb, or a plain step), w itself is the start. After a
    climb that was not ok, or with found_inf, every block only returns, and the skip is counted.

    With ALONG_V, partials[0, p] = the sum of v^2 over what climbed of program p's blocks, in the
    order and so with the bits of `norm_kernel`, wherever gradients and weights lie.
    """
    inv_scale, c = tl.load(control + INV_SCALE2), tl.load(control + SHARE)
    ok = tl.load(control + FOUND_INF) == 0
    if PERTURBED:
        ok = ok & (tl.load(control + OK) != 0)
    of_v = tl.zeros((SUMS,), tl.float32)
    few_of_v = tl.zeros((SUMS,), tl.float32)
    offs, few = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    block, last = share_of_blocks(n_blocks)
    while block < last:
        slot, group, begin, flat, size, n = run_of_blocks(block, last, blocks, layout, BLOCK)
        block += n
        w = from_element(tl.load(w_table + slot), begin, TYPE)
        g = tl.load(g_table + slot)
        climbed = False
        if PERTURBED:
            climbed = tl.load(climbed_table + slot) != 0
        fours = 0
        if g != 0:
            g = from_element(g, begin, G_TYPE)
            row = hyper + group * HYPER
            count = tl.load(v_steps + slot)
            h = adam_hyper(row, count) if BASE == ADAM else sgd_hyper(row)
            alpha = tl.load(row + ALPHA)
            fours = in_fours(size, w | g) if climbed == PERTURBED else 0
            wide = wide_place(flat)
            for i in range(0, fours, BLOCK):
                x = update(wide_pointer(w, TYPE) + i, wide_pointer(g, G_TYPE) + i, saved, v, u, m,
                           kept, wide + i, offs, offs < fours - i, inv_scale, c, alpha, h,
                           count, PERTURBED, ok, BASE, MIX, MASTERS, TYPE)
                if ALONG_V:
                    of_v += folded(x, SUMS)
            for i in range(fours, size, BLOCK // 2):
                update(pointer(w, TYPE) + i, pointer(g, G_TYPE) + i, saved, v, u, m, kept,
                       flat + i, few, few < size - i, inv_scale, c, alpha, h, count,
                       climbed, ok, BASE, MIX, MASTERS, TYPE)
        elif climbed:
            for i in range(0, size, BLOCK // 2):
                mask = few < size - i
                back = read(saved + flat + i + few, mask).to(TYPE)
                tl.store(pointer(w, TYPE) + i + few, back, mask)
        if ALONG_V:
            if climbed:
                wide, whole = wide_place(flat), in_fours(size, 0)
                if fours < whole:
                    tl.debug_barrier()  # another thread has stored that v
                of_v, few_of_v = add_squares(v, wide, flat, fours, whole, size, of_v, few_of_v,
                                             BLOCK)
    if ALONG_V:
        store_sum(partials, tl.sum(of_v) + tl.sum(few_of_v), PARTIALS)
    skipped = tl.load(counters + SKIPPED)  # every thread reads, one writes: the barrier between
    if is_last_program(counters + STEP_TICKET):
        tl.store(counters + SKIPPED, skipped + (ok == 0).to(tl.int32))
        count_steps(g_table, layout, hyper, v_steps, n_slots, ok, BASE)


def block_of(mix: int, masters: bool) -> int:
    """Elements of K3's blocks: half as many where the most is held of each, LookSAM's g_v, which is
    renewed, beside masters."""
    return BLOCK // 2 if mix == MIXES["renew"] and masters else BLOCK


def step(p: Pass, climb: Climb | None) -> None:
    """The base optimizer from the saved w (from w itself where nothing was saved) with p.g. In
    fastsam.reference: `step`."""
    climbed = None if climb is None else climb.table
    launch(step_kernel, p, (p.w_table, p.g_table, climbed), step_arguments, climb is not None,
           MIXES[p.mix], p.along_v)


def step_arguments(p: Pass, perturbed: bool, mix: int, along_v: bool) -> dict:
    space, masters = p.space, p.space.kind.masters
    m, kept = (space.m, space.kept) if mix else (None, None)
    return dict(saved=space.saved, v=space.v, u=space.u, m=m, kept=kept, partials=space.partials,
                counters=space.counters, v_steps=space.steps[1], n_slots=len(space.slots),
                BASE=BASES[space.kind.base], MIX=mix, PERTURBED=perturbed, ALONG_V=along_v,
                MASTERS=masters, BLOCK=block_of(mix, masters), PARTIALS=PARTIALS)
