"""K0, only where the projection is not a constant: the inner products of g and m."""

import triton
import triton.language as tl

from .common import (
    ALGORITHM1,
    BLOCK,
    EMA_SHARE,
    HYPER,
    INV_SCALE1,
    LMBDA,
    MODES,
    OPTIONS,
    PARTIALS,
    TYPES,
    launching_on,
    locate,
    pointer,
    read,
    wide_pointer,
)


@triton.jit
def products(g_ptr, m, flat, offs, mask, inv_scale, lmbda, share, MODE: tl.constexpr):
    """g m, g^2 and m^2 of one block, with the m that is projected with."""
    g = read(g_ptr + offs, mask).to(tl.float32) * inv_scale
    m = read(m + flat + offs, mask)
    if MODE == ALGORITHM1:
        m = lmbda * m + share * g
    return g * m, g * g, m * m


@triton.jit
def dots_kernel(g_table, m, dots, blocks, layout, hyper, control, n_blocks,
                MODE: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
                PARTIALS: tl.constexpr):
    """dots[:, p] = the sums of g m, g^2 and m^2 over program p's blocks. Reads g, m."""
    inv_scale = tl.load(control + INV_SCALE1)
    gm = tl.zeros((BLOCK,), tl.float32)
    gg = tl.zeros((BLOCK,), tl.float32)
    mm = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        slot, start, flat, length, group = locate(block, blocks, layout, BLOCK)
        g = tl.load(g_table + slot)
        if g != 0:
            row = hyper + group * HYPER
            lmbda, share = tl.load(row + LMBDA), tl.load(row + EMA_SHARE)
            offs = tl.arange(0, BLOCK)
            if (length >= BLOCK) & (g % 16 == 0):
                x, y, z = products(wide_pointer(g, TYPE) + start, m, flat, offs, None,
                                   inv_scale, lmbda, share, MODE)
            else:
                x, y, z = products(pointer(g, TYPE) + start, m, flat, offs, offs < length,
                                   inv_scale, lmbda, share, MODE)
            gm += x
            gg += y
            mm += z
    program = tl.program_id(0)
    tl.store(dots + program, tl.sum(gm))
    tl.store(dots + PARTIALS + program, tl.sum(gg))
    tl.store(dots + 2 * PARTIALS + program, tl.sum(mm))


def dots(space) -> None:
    """space.dots = the parts of <g, m>, <g, g> and <m, m>, with the m that is projected with."""
    blocks = space.blocks(BLOCK)
    with launching_on(space):
        dots_kernel[(max(1, min(len(blocks), PARTIALS)),)](
            g_table=space.addresses("g1"), m=space.m, dots=space.dots, blocks=blocks,
            layout=space.layout(), hyper=space.hyper, control=space.control_buffer,
            n_blocks=len(blocks), MODE=MODES[space.mode], TYPE=TYPES[space.dtype], BLOCK=BLOCK,
            PARTIALS=PARTIALS, **OPTIONS)
