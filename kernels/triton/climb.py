"""K2: the moving average, and the climb along the scaled direction."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...passes import Climb, Pass
from ...space import GUARD, PARTIALS, noise_share
from .common import (
    BLOCK,
    CLIMB_TICKET,
    EMA_SHARE,
    HYPER,
    INV_SCALE1,
    KEPT,
    LMBDA,
    MODES,
    NORM,
    OFFICIAL,
    OK,
    PLAIN,
    RHO,
    SCALINGS,
    SIGMA,
    SUMS,
    UNSCALED,
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
from .norm import ascent, scaling


@triton.jit
def move(w, g, saved, m, flat, offs, mask, a, b, inv_scale, sigma, lmbda, ema_share, scale, ok,
         moves, MODE: tl.constexpr, SCALING: tl.constexpr, MASTERS: tl.constexpr,
         CAN_ROUND_AWAY: tl.constexpr):
    """Save w, store w' = w + e with e = scale T^2 d, and the new m, of one block, which lies at w,
    g and flat. Returns (w' - w)^2 as stored, and e^2 where rounding can make it another."""
    w_in, w32, taken = weights(w + offs, saved + flat + offs, mask, MASTERS)
    g = read(g + offs, mask).to(tl.float32) * inv_scale
    old_m = g
    if MODE > PLAIN:
        old_m = read(m + flat + offs, mask)
    d, new_m = ascent(g, old_m, sigma, lmbda, ema_share, MODE)
    if SCALING != UNSCALED:
        T = scaling(w32, g, a, b, SCALING)
        d = T * (T * d)
    e = tl.where(moves, scale * d, 0.0)
    moved = (w32 + e).to(w_in.dtype)
    tl.store(saved + flat + offs, w32 if MASTERS else w_in, taken)
    tl.store(w + offs, moved, mask)
    if (MODE > PLAIN) & (MODE <= OFFICIAL):
        tl.store(m + flat + offs, tl.where(ok, new_m, old_m), mask)
    if MODE == KEPT:
        tl.store(m + flat + offs, g, mask)
    old, new = w_in.to(tl.float32), moved.to(tl.float32)
    realised = tl.where(ok, tl.where(new != old, new - old, 0.0), 0.0)  # inf - inf is NaN
    if not CAN_ROUND_AWAY:
        e = realised
    return realised * realised, e * e


@triton.jit
def sum_of(parts, n_spaces, PARTIALS: tl.constexpr):
    """The sum of each space's parts in a fixed order: every program gets the same bits."""
    total = tl.zeros((PARTIALS,), tl.float32)
    for i in range(n_spaces):
        total += tl.load(parts + i * PARTIALS + tl.arange(0, PARTIALS))
    return tl.sum(total)


def block_of(mode: int, scaling: int, dtype: torch.dtype, masters: bool) -> int:
    """Elements of K2's blocks: twice as many where there is least to read, and little to do."""
    more = mode or scaling == SCALINGS["gradient"] or masters or dtype.itemsize == 4
    return BLOCK if more else 2 * BLOCK


@jit
def climb_kernel(w_table, g_table, sums, saved, m, radii, blocks, layout, scalings, hyper, control,
                 counters, m_steps, n_blocks, n_slots, n_spaces, guard, noise_share,
                 MODE: tl.constexpr, SCALING: tl.constexpr, MASTERS: tl.constexpr,
                 TYPE: tl.constexpr, G_TYPE: tl.constexpr, BLOCK: tl.constexpr,
                 PARTIALS: tl.constexpr):
    """w -> w + rho T^2 d / ||T d|| with w saved and m updated. Reads g, m, w; writes m, saved w,
    w, the partial sums of the squared radii (realised; wanted, for 16-bit weights without
    masters), and control's norm and ok."""
    CAN_ROUND_AWAY: tl.constexpr = TYPE.primitive_bitwidth == 16 and not MASTERS
    squared = sum_of(sums, n_spaces, PARTIALS)
    norm = tl.sqrt_rn(squared)
    ok = norm < float("inf")  # false for NaN too
    moves = ok
    if MODE > PLAIN:
        of_g = sum_of(sums + n_spaces * PARTIALS, n_spaces, PARTIALS)
        moves = ok & (squared > noise_share * of_g)
    inv_scale = tl.load(control + INV_SCALE1)
    if tl.program_id(0) == 0:
        tl.store(control + NORM, norm)
        tl.store(control + OK, ok.to(tl.float32))
    realised = tl.zeros((SUMS,), tl.float32)
    few_realised = tl.zeros((SUMS,), tl.float32)
    wanted = tl.zeros((SUMS,), tl.float32)
    few_wanted = tl.zeros((SUMS,), tl.float32)
    offs, few = tl.arange(0, BLOCK), tl.arange(0, SUMS)  # few: folded as it is
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
            scale = tl.div_rn(tl.load(row + RHO), norm + guard)
            sigma = tl.load(row + SIGMA)
            lmbda, ema_share = tl.load(row + LMBDA), tl.load(row + EMA_SHARE)
            if MODE == OFFICIAL:  # the first m, after one that is 0, is g itself
                first = tl.load(m_steps + slot) == 0
                lmbda, ema_share = tl.where(first, 0.0, lmbda), tl.where(first, 1.0, ema_share)
            fours = in_fours(size, w | g)
            wide = wide_place(flat)
            for i in range(0, fours, BLOCK):
                x, y = move(wide_pointer(w, TYPE) + i, wide_pointer(g, G_TYPE) + i, saved, m,
                            wide + i, offs, offs < fours - i, a, b, inv_scale, sigma, lmbda,
                            ema_share, scale, ok, moves, MODE, SCALING, MASTERS, CAN_ROUND_AWAY)
                realised += folded(x, SUMS)
                if CAN_ROUND_AWAY:
                    wanted += folded(y, SUMS)
            for i in range(fours, size, SUMS):
                x, y = move(pointer(w, TYPE) + i, pointer(g, G_TYPE) + i, saved, m,
                            flat + i, few, few < size - i, a, b, inv_scale, sigma, lmbda,
                            ema_share, scale, ok, moves, MODE, SCALING, MASTERS, CAN_ROUND_AWAY)
                few_realised += x
                if CAN_ROUND_AWAY:
                    few_wanted += y
    store_sum(radii, tl.sum(realised) + tl.sum(few_realised), PARTIALS)
    if CAN_ROUND_AWAY:
        store_sum(radii + PARTIALS, tl.sum(wanted) + tl.sum(few_wanted), PARTIALS)
    if is_last_program(counters + CLIMB_TICKET):
        for i in range(0, n_slots, 128):
            slots = i + tl.arange(0, 128)
            mask = slots < n_slots
            count = tl.load(m_steps + slots, mask, 0)
            climbed = (tl.load(g_table + slots, mask, 0) != 0).to(tl.int32) * ok.to(tl.int32)
            tl.store(m_steps + slots, count + climbed, mask)


def climb(p: Pass, sums: Tensor) -> Climb:
    """w -> w + rho T^2 d / ||T d||, with w saved and m updated; `sums`: (2, k), the partials of
    every space of the optimizer."""
    done = Climb.of(p)  # nothing is left to fail once weights move
    launch(climb_kernel, p, (p.w_table, p.g_table, sums), climb_arguments,
           sums.shape[1] // PARTIALS, sums.data_ptr() % 16)  # Triton compiles for both
    return done


def climb_arguments(p: Pass, n_spaces: int, _: int) -> dict:
    space = p.space
    m = space.m if space.kept is None else space.kept
    mode, scaling, masters = MODES[space.kind.mode], SCALINGS[p.scaling], space.kind.masters
    return dict(saved=space.saved, m=m, radii=space.radii, scalings=space.scalings,
                counters=space.counters, m_steps=space.steps[0], n_slots=len(space.slots),
                n_spaces=n_spaces, guard=GUARD, noise_share=noise_share(torch.float32),
                MODE=mode, SCALING=scaling, MASTERS=masters, PARTIALS=PARTIALS,
                BLOCK=block_of(mode, scaling, space.kind.dtype, masters))
