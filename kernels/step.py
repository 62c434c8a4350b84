"""K3: the return to the saved weights and the SGD update, in one pass."""

import triton
import triton.language as tl

from .common import (
    BLOCK,
    FOUND_INF,
    HYPER,
    INV_SCALE2,
    LR,
    MOMENTUM,
    MOMENTUM_SHARE,
    NESTEROV,
    OK,
    OPTIONS,
    PARTIALS,
    SKIPPED,
    STEP_TICKET,
    TYPES,
    WEIGHT_DECAY,
    is_last_program,
    launching_on,
    locate,
    pointer,
    read,
    wide_pointer,
)


@triton.jit
def update(source_ptr, w_ptr, g_ptr, v, flat, offs, mask, inv_scale, lr, momentum, share,
           weight_decay, nesterov, is_first, ok, HAS_MOMENTUM: tl.constexpr):
    """torch.optim.SGD's update of one block, from the w at source_ptr to the one at w_ptr."""
    w_in = read(source_ptr + offs, mask)
    w = w_in.to(tl.float32)
    g = read(g_ptr + offs, mask).to(tl.float32) * inv_scale
    g = g + weight_decay * w
    if HAS_MOMENTUM:
        old_v = read(v + flat + offs, mask)
        new_v = tl.where(is_first, g, momentum * old_v + share * g)
        has_momentum = momentum != 0
        tl.store(v + flat + offs, tl.where(ok & has_momentum, new_v, old_v), mask)
        ahead = tl.where(nesterov != 0, g + momentum * new_v, new_v)
        g = tl.where(has_momentum, ahead, g)
    tl.store(w_ptr + offs, tl.where(ok, (w - lr * g).to(w_in.dtype), w_in), mask)


@triton.jit
def step_kernel(w_table, climbed_table, g2_table, backup, v, blocks, layout, hyper, control,
                counters, v_steps, n_blocks, n_slots, HAS_MOMENTUM: tl.constexpr,
                PERTURBED: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """w = SGD(saved w, g2); where there is no g2, w = saved w. Reads saved w, v, g2; writes v, w.

    Where nothing was saved (it did not climb, or a plain step), w itself is the start. After a
    climb that was not ok, or with found_inf, every block only returns, and the skip is counted.
    """
    inv_scale = tl.load(control + INV_SCALE2)
    ok = tl.load(control + FOUND_INF) == 0
    if PERTURBED:
        ok = ok & (tl.load(control + OK) != 0)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        slot, start, flat, length, group = locate(block, blocks, layout, BLOCK)
        w = tl.load(w_table + slot)
        g = tl.load(g2_table + slot)
        saved = False
        if PERTURBED:
            saved = tl.load(climbed_table + slot) != 0
        offs = tl.arange(0, BLOCK)
        if g != 0:
            row = hyper + group * HYPER
            lr, momentum = tl.load(row + LR), tl.load(row + MOMENTUM)
            share, nesterov = tl.load(row + MOMENTUM_SHARE), tl.load(row + NESTEROV)
            weight_decay = tl.load(row + WEIGHT_DECAY)
            is_first = tl.load(v_steps + slot) == 0
            wide = (length >= BLOCK) & ((w | g) % 16 == 0)
            if wide & (saved == PERTURBED):
                target = wide_pointer(w, TYPE) + start
                update(backup + flat if PERTURBED else target, target,
                       wide_pointer(g, TYPE) + start, v, flat, offs, None, inv_scale, lr,
                       momentum, share, weight_decay, nesterov, is_first, ok, HAS_MOMENTUM)
            else:
                source = pointer(w, TYPE) + start
                if saved:
                    source = backup + flat
                update(source, pointer(w, TYPE) + start, pointer(g, TYPE) + start, v, flat, offs,
                       offs < length, inv_scale, lr, momentum, share, weight_decay, nesterov,
                       is_first, ok, HAS_MOMENTUM)
        elif saved:
            mask = offs < length
            tl.store(pointer(w, TYPE) + start + offs, tl.load(backup + flat + offs, mask), mask)
    if is_last_program(counters + STEP_TICKET):
        tl.store(counters + SKIPPED, tl.load(counters + SKIPPED) + (ok == 0).to(tl.int32))
        for i in range(0, n_slots, 128):
            slots = i + tl.arange(0, 128)
            mask = slots < n_slots
            count = tl.load(v_steps + slots, mask, 0)
            momentum = tl.load(hyper + tl.load(layout + 3 * slots + 2, mask, 0) * HYPER + MOMENTUM)
            moved = (tl.load(g2_table + slots, mask, 0) != 0) & (momentum != 0)
            tl.store(v_steps + slots, count + moved.to(tl.int32) * ok.to(tl.int32), mask)


def step(space, perturbed: bool) -> None:
    """SGD from the saved w (from w itself where nothing was saved) with g2."""
    blocks = space.blocks(BLOCK)
    with launching_on(space):
        step_kernel[(max(1, min(len(blocks), PARTIALS)),)](
            w_table=space.addresses("w"), climbed_table=space.climbed() if perturbed else None,
            g2_table=space.addresses("g2"), backup=space.backup, v=space.v, blocks=blocks,
            layout=space.layout(), hyper=space.hyper, control=space.control_buffer,
            counters=space.counters, v_steps=space.steps[1], n_blocks=len(blocks),
            n_slots=len(space.slots), HAS_MOMENTUM=space.momentum, PERTURBED=perturbed,
            TYPE=TYPES[space.dtype], BLOCK=BLOCK, **OPTIONS)
