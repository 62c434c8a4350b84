"""The loops over memory of the CPU backend, compiled by numba. `cpu.py` calls them.

A loop takes blocks of BLOCK elements, one by one, until none is left: each thread that runs it
takes the next. A block lies in one slot; weight and gradient are reached by the slot's address,
the flat buffers by its offset. Letters and the order of every operation are the reference's
(`fastsam.reference`), so that the results are: there is no fastmath, and no contraction; a number
over a tensor is torch's reciprocal and product.

`dots`, `norm`, `climb` and `step` make a loop for one kind of space. What differs between kinds is
compiled in; what a user sets is read from the table of hyper-parameters.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba import boolean, float32, float64, int32, int64, njit, void
from numba.core import cgutils
from numba.extending import intrinsic

from fastsam.hyper import COLUMN, KEEPING, WITH_M
from fastsam.space import CONTROL, GUARD

BLOCK = 16384
CHUNK = 1024  # elements whose squares wait in the first cache to be added up
LANES = 16  # partial sums, so that adding up in a fixed order is done in vectors
# Buffers that do not overlap, or where `old` is w, only element by element: so a loop over them
# may be done in vectors without a look at where they are.
STREAMS = ("w", "g", "old", "saved", "m", "v", "u", "kept", "x", "y", "z")

TYPES = {"f4": ir.FloatType(), "f8": ir.DoubleType(), "bf16": ir.IntType(16),
         "f16": ir.IntType(16)}
NUMBERS = {"f4": float32, "f8": float64}
SIZES = {"f4": 4, "f8": 8, "bf16": 2, "f16": 2}
HALF, FULL = ir.IntType(16), ir.IntType(32)


def accumulates_in(dtype: str) -> str:
    """The dtype of state and arithmetic."""
    return "f8" if dtype == "f8" else "f4"


def locate(builder: ir.IRBuilder, address: ir.Value, i: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [i])


def part_from_others(builder: ir.IRBuilder, access: ir.Instruction, stream: str) -> None:
    """Tell the compiler that this access touches one stream and none of the others."""
    module = builder.module
    domain = module.add_metadata(["fastsam"])
    scopes = {name: module.add_metadata([f"fastsam.{name}", domain]) for name in STREAMS}
    access.set_metadata("alias.scope", module.add_metadata([scopes.pop(stream)]))
    access.set_metadata("noalias", module.add_metadata(list(scopes.values())))


def widened(builder: ir.IRBuilder, value: ir.Value, dtype: str) -> ir.Value:
    """A stored value in the precision of the arithmetic."""
    if dtype in ("f4", "f8"):
        return value
    b, single = builder, ir.FloatType()
    bits = b.zext(value, FULL)
    if dtype == "bf16":
        return b.bitcast(b.shl(bits, FULL(16)), single)
    sign = b.shl(b.and_(bits, FULL(0x8000)), FULL(16))
    low = b.shl(b.and_(bits, FULL(0x7fff)), FULL(13))
    exponent = b.and_(low, FULL(0x1f << 23))
    normal = b.add(low, FULL(112 << 23))
    special = b.add(low, FULL(224 << 23))  # inf and NaN
    tiny = b.fsub(b.bitcast(b.add(low, FULL(113 << 23)), single), single(2.0 ** -14))
    size = b.select(b.icmp_unsigned("==", exponent, FULL(0x1f << 23)), special, normal)
    size = b.select(b.icmp_unsigned("==", exponent, FULL(0)), b.bitcast(tiny, FULL), size)
    return b.bitcast(b.or_(size, sign), single)


def narrowed(builder: ir.IRBuilder, value: ir.Value, dtype: str) -> ir.Value:
    """A value as it is stored: rounded to nearest, ties to even."""
    if dtype in ("f4", "f8"):
        return value
    b, single = builder, ir.FloatType()
    bits = b.bitcast(value, FULL)
    size = b.and_(bits, FULL(0x7fffffff))
    nan = b.icmp_unsigned(">", size, FULL(0x7f800000))
    if dtype == "bf16":
        odd = b.and_(b.lshr(bits, FULL(16)), FULL(1))
        near = b.lshr(b.add(b.add(bits, FULL(0x7fff)), odd), FULL(16))
        return b.trunc(b.select(nan, FULL(0x7fc0), near), HALF)
    odd = b.and_(b.lshr(size, FULL(13)), FULL(1))
    normal = b.lshr(b.add(b.add(size, FULL(0xfff - (112 << 23) & 0xffffffff)), odd), FULL(13))
    # adding 1/2 leaves the bits of a multiple of 2^-24 at the end
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(size, single), single(0.5)), FULL), FULL(126 << 23))
    near = b.select(b.icmp_unsigned("<", size, FULL(113 << 23)), tiny, normal)
    near = b.select(b.icmp_unsigned(">=", size, FULL(0x477ff000)), FULL(0x7c00), near)
    near = b.select(nan, FULL(0x7e00), near)
    sign = b.lshr(b.and_(bits, FULL(0x80000000)), FULL(16))
    return b.trunc(b.or_(near, sign), HALF)


@intrinsic(prefer_literal=True)
def load(context, address, i, stream, dtype):
    """Element i of the stream at this address, in the precision of the arithmetic."""
    kind = dtype.literal_value

    def generate(_, builder, signature, args):
        value = builder.load(locate(builder, *args[:2], TYPES[kind]), align=1)
        part_from_others(builder, value, stream.literal_value)
        return widened(builder, value, kind)

    return NUMBERS[accumulates_in(kind)](address, i, stream, dtype), generate


@intrinsic(prefer_literal=True)
def store(context, address, i, value, stream, dtype):
    kind = dtype.literal_value

    def generate(_, builder, signature, args):
        target = locate(builder, *args[:2], TYPES[kind])
        access = builder.store(narrowed(builder, args[2], kind), target, align=1)
        part_from_others(builder, access, stream.literal_value)
        return args[1]

    return int64(address, i, NUMBERS[accumulates_in(kind)], stream, dtype), generate


@intrinsic(prefer_literal=True)
def rounded(context, value, dtype):
    """The value as a store and a load would give it back."""
    kind = dtype.literal_value

    def generate(_, builder, signature, args):
        return widened(builder, narrowed(builder, args[0], kind), kind)

    return value(value, dtype), generate


@intrinsic(prefer_literal=True)
def scratch(context, dtype):
    """The address of CHUNK elements on this thread's stack."""
    def generate(_, builder, signature, args):
        place = cgutils.alloca_once(builder, ir.ArrayType(TYPES[dtype.literal_value], CHUNK))
        place.align = 64
        return builder.ptrtoint(place, ir.IntType(64))

    return int64(dtype), generate


@intrinsic(prefer_literal=True)
def total(context, address, n, stream, dtype):
    """The sum of the n elements of a scratch buffer, in LANES partial sums. Zeroes what lies
    between n and the next multiple of LANES."""
    kind = TYPES[dtype.literal_value]

    def generate(_, builder, signature, args):
        start, count = args[:2]
        wide = ir.VectorType(kind, LANES)
        lanes = cgutils.alloca_once_value(builder, wide([kind(0.0)] * LANES))
        turns = builder.sdiv(builder.add(count, count.type(LANES - 1)), count.type(LANES))
        padded = builder.mul(turns, count.type(LANES))
        with cgutils.for_range(builder, builder.sub(padded, count)) as loop:
            where = locate(builder, start, builder.add(count, loop.index), kind)
            part_from_others(builder, builder.store(kind(0.0), where), stream.literal_value)
        with cgutils.for_range(builder, turns) as loop:
            part = builder.load(locate(builder, start, loop.index, wide), align=64 // LANES)
            part_from_others(builder, part, stream.literal_value)
            builder.store(builder.fadd(builder.load(lanes), part), lanes)
        lanes = builder.load(lanes)
        result = ir.DoubleType()(0.0)
        for j in range(LANES):
            lane = builder.extract_element(lanes, FULL(j))
            if kind != ir.DoubleType():
                lane = builder.fpext(lane, ir.DoubleType())
            result = builder.fadd(result, lane)
        return result

    return float64(address, n, stream, dtype), generate


@intrinsic
def take(context, ticket):
    """The number of a block that no other thread has."""
    def generate(context, builder, signature, args):
        cell = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", cell, ir.IntType(64)(1), "monotonic")

    return int64(ticket), generate


ALPHA, C = COLUMN["alpha"], CONTROL.index("share")
RHO, SIGMA, LMBDA, SHARE = (COLUMN[c] for c in ("rho", "sigma", "lmbda", "ema_share"))
LR, WEIGHT_DECAY = COLUMN["lr"], COLUMN["weight_decay"]
MOMENTUM, DAMPENING, NESTEROV, MOMENTUM_SHARE = (
    COLUMN[c] for c in ("momentum", "dampening", "nesterov", "momentum_share"))
BETA1, BETA2, BETA1_SHARE, BETA2_SHARE, LOG_BETA1, LOG_BETA2, EPS, DECOUPLED = (
    COLUMN[c] for c in ("beta1", "beta2", "beta1_share", "beta2_share", "log_beta1", "log_beta2",
                        "eps", "decoupled"))
INV_SCALE1, INV_SCALE2 = CONTROL.index("inv_scale1"), CONTROL.index("inv_scale2")


def compiled(*arguments) -> Callable:
    """numba's decorator for these types, which are compiled at once, or found in its cache where
    it can keep one."""
    def compile_now(function: Callable) -> Callable:
        how = dict(nogil=True, error_model="numpy")
        try:
            return njit(void(*arguments), cache=True, **how)(function)
        except Exception:  # no folder, no room, a broken file: what is wrong with the code itself
            return njit(void(*arguments), **how)(function)  # is said here

    return compile_now


def tables(dtype: str) -> tuple:
    """The types of ticket, blocks, layout, hyper, scalings, control, steps and w_table, g_table."""
    F = NUMBERS[accumulates_in(dtype)]
    return (int64[::1], int32[:, ::1], int64[:, ::1], F[:, ::1], F[:, ::1], F[::1], int32[::1],
            int64[::1], int64[::1])


@lru_cache
def dots(mode: str, dtype: str, g_dtype: str) -> Callable:
    """sums[:, b] = <g, m>, <g, g> and <m, m> of block b, with the m that is projected with. Of a
    second pass, where the mode has one."""
    G, A = g_dtype, accumulates_in(dtype)
    size, g_size = SIZES[A], SIZES[G]
    new = mode == "algorithm1"
    cell = INV_SCALE2 if mode in KEEPING else INV_SCALE1

    @compiled(*tables(dtype), int64, float64[:, ::1])
    def loop(ticket, blocks, layout, hyper, scalings, control, m_steps, w_table, g_table, m, sums):
        x, y, z = scratch(A), scratch(A), scratch(A)
        inv_scale = control[cell]
        while True:
            block = take(ticket)
            if block >= len(blocks):
                break
            slot, first = blocks[block, 0], blocks[block, 1] * BLOCK
            sums[:, block] = 0
            if g_table[slot] == 0:
                continue
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            lmbda, share = hyper[group, LMBDA], hyper[group, SHARE]
            for start in range(first, min(end, first + BLOCK), CHUNK):
                n = min(CHUNK, end - start)
                g_at, m_at = g_table[slot] + start * g_size, m + (offset + start) * size
                for i in range(n):
                    g = load(g_at, i, "g", G) * inv_scale
                    old = load(m_at, i, "m", A)
                    mean = lmbda * old + share * g if new else old
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
def norm(mode: str | None, scaling: str | None, masters: bool, dtype: str, g_dtype: str,
         ) -> Callable:
    """sums[0, b] = ||T d||^2 of block b; where d is made with m also sums[1, b] = ||T g||^2."""
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    size, w_size, g_size = SIZES[A], SIZES[W], SIZES[G]
    has_m, new, along = mode in WITH_M, mode == "algorithm1", mode == "full"
    by_w, by_g = scaling == "weights", scaling == "gradient"
    one = np.dtype(A).type(1)

    @compiled(*tables(dtype), int64, int64, float64[:, ::1])
    def loop(ticket, blocks, layout, hyper, scalings, control, m_steps, w_table, g_table, saved, m,
             sums):
        x, y = scratch(A), scratch(A)
        inv_scale = control[INV_SCALE1]
        while True:
            block = take(ticket)
            if block >= len(blocks):
                break
            slot, first = blocks[block, 0], blocks[block, 1] * BLOCK
            sums[0, block] = 0
            sums[1, block] = 0
            if g_table[slot] == 0:
                continue
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            a, b, sigma = scalings[slot, 0], scalings[slot, 1], hyper[group, SIGMA]
            lmbda, share = hyper[group, LMBDA], hyper[group, SHARE]
            for start in range(first, min(end, first + BLOCK), CHUNK):
                n = min(CHUNK, end - start)
                w_at, g_at = w_table[slot] + start * w_size, g_table[slot] + start * g_size
                saved_at, m_at = saved + (offset + start) * size, m + (offset + start) * size
                for i in range(n):
                    g = load(g_at, i, "g", G) * inv_scale
                    d = g
                    if has_m:
                        mean = load(m_at, i, "m", A)
                        if new:
                            mean = lmbda * mean + share * g
                        d = sigma * mean if along else g - sigma * mean
                    if by_w or by_g:
                        T = one
                        if by_w:
                            w = load(w_at, i, "w", W)
                            if masters:
                                master = load(saved_at, i, "saved", A)
                                w = master if rounded(master, W) == w else w
                            T = a * abs(w) + b
                        else:
                            T = one / math.sqrt(one + a * g * g)
                        d = T * d
                        g = T * g
                    store(x, i, d * d, "x", A)
                    if has_m:
                        store(y, i, g * g, "y", A)
                sums[0, block] += total(x, n, "x", A)
                if has_m:
                    sums[1, block] += total(y, n, "y", A)

    return loop


@lru_cache
def climb(mode: str | None, scaling: str | None, masters: bool, dtype: str, g_dtype: str,
          ) -> Callable:
    """w -> w + e with w saved and m updated, e = rho / (norm + GUARD) T^2 d, or 0 unless `moves`.
    Where the gradient is kept, m is where. sums[0, b], sums[1, b] = the squared length of e in
    block b, as stored, and as wanted (where rounding to 16 bits can part them)."""
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    S = A if masters else W
    size, w_size, g_size, s_size = SIZES[A], SIZES[W], SIZES[G], SIZES[S]
    has_m, new, along = mode in WITH_M, mode == "algorithm1", mode == "full"
    averages, official = mode in ("algorithm1", "official"), mode == "official"
    keeps = mode in KEEPING
    by_w, by_g = scaling == "weights", scaling == "gradient"
    rounds = W in ("bf16", "f16")
    one, zero, guard = (np.dtype(A).type(x) for x in (1, 0, GUARD))

    @compiled(*tables(dtype), int64, int64, NUMBERS[A], boolean, float64[:, ::1])
    def loop(ticket, blocks, layout, hyper, scalings, control, m_steps, w_table, g_table, saved, m,
             norm, moves, sums):
        x, y = scratch(A), scratch(A)
        inv_scale = control[INV_SCALE1]
        while True:
            block = len(blocks) - 1 - take(ticket)  # backwards: what the norm read last is near
            if block < 0:
                break
            slot, first = blocks[block, 0], blocks[block, 1] * BLOCK
            sums[0, block] = 0
            sums[1, block] = 0
            if g_table[slot] == 0:
                continue
            offset, end, group = layout[slot, 0], layout[slot, 1], layout[slot, 2]
            a, b, sigma = scalings[slot, 0], scalings[slot, 1], hyper[group, SIGMA]
            lmbda, share = hyper[group, LMBDA], hyper[group, SHARE]
            scale = one / (norm + guard) * hyper[group, RHO] if moves else zero
            begins = m_steps[slot] == 0
            for start in range(first, min(end, first + BLOCK), CHUNK):
                n = min(CHUNK, end - start)
                w_at, g_at = w_table[slot] + start * w_size, g_table[slot] + start * g_size
                saved_at, m_at = saved + (offset + start) * s_size, m + (offset + start) * size
                for i in range(n):
                    stored = load(w_at, i, "w", W)
                    w = stored
                    if masters:
                        master = load(saved_at, i, "saved", A)
                        w = master if rounded(master, W) == w else w
                    g = load(g_at, i, "g", G) * inv_scale
                    d = g
                    if keeps:
                        store(m_at, i, g, "m", A)
                    if has_m:
                        mean = load(m_at, i, "m", A)
                        average = lmbda * mean + share * g
                        if new:
                            mean = average
                        d = sigma * mean if along else g - sigma * mean
                        if averages:
                            if official:
                                average = g if begins else average
                            store(m_at, i, average, "m", A)
                    if by_w:
                        T = a * abs(w) + b
                        d = T * (T * d)
                    if by_g:
                        T = one / math.sqrt(one + a * g * g)
                        d = T * (T * d)
                    e = scale * d
                    store(saved_at, i, w, "saved", S)
                    store(w_at, i, w + e, "w", W)
                    length = rounded(w + e, W) - stored
                    store(x, i, length * length, "x", A)
                    if rounds:
                        store(y, i, e * e, "y", A)
                part = total(x, n, "x", A)
                sums[0, block] += part
                sums[1, block] += total(y, n, "y", A) if rounds else part

    return loop


@lru_cache
def step(base: str, mix: str | None, along_v: bool, masters: bool, dtype: str, g_dtype: str,
         ) -> Callable:
    """The base optimizer's update from the saved w, where `moved`, or from w. With along_v,
    sums[0, b] = ||v||^2 of block b, where `moved`, as `norm` adds it up."""
    return (adam if base == "adam" else sgd)(base, mix, along_v, masters, dtype, g_dtype)


def sgd(base: str, mix: str | None, along_v: bool, masters: bool, dtype: str, g_dtype: str,
        ) -> Callable:
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    S = A if masters else W
    size, w_size, g_size, s_size = SIZES[A], SIZES[W], SIZES[G], SIZES[S]
    has_v = base == "sgd-momentum"
    gsam, renews, reuses = (mix == x for x in ("gsam", "renew", "reuse"))

    @compiled(*tables(dtype), int64[::1], int64, int64, int64, int64, int64, float64[:, ::1])
    def loop(ticket, blocks, layout, hyper, scalings, control, v_steps, w_table, g_table, moved,
             saved, v, u, m, kept, sums):
        inv_scale, c = control[INV_SCALE2], control[C]
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
            momentum, share = hyper[group, MOMENTUM], hyper[group, MOMENTUM_SHARE]
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
                if gsam and returns:
                    g = g - alpha * (load(kept_at, i, "kept", A) - c * g)
                if renews and returns:
                    store(m_at, i, g - c * load(kept_at, i, "kept", A), "m", A)
                if reuses:
                    g = g + alpha * (c * load(m_at, i, "m", A))
                g = g + weight_decay * w if weight_decay != 0 else g
                if has_v:
                    old = load(v_at, i, "v", A)
                    new = g if begins else momentum * old + share * g
                    store(v_at, i, new if momentum != 0 else old, "v", A)
                    ahead = g + momentum * new if nesterov else new
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
    W, G, A = dtype, g_dtype, accumulates_in(dtype)
    S = A if masters else W
    size, w_size, g_size, s_size = SIZES[A], SIZES[W], SIZES[G], SIZES[S]
    F = np.dtype(A).type
    gsam, renews, reuses = (mix == x for x in ("gsam", "renew", "reuse"))

    @compiled(*tables(dtype), int64[::1], int64, int64, int64, int64, int64, float64[:, ::1])
    def loop(ticket, blocks, layout, hyper, scalings, control, v_steps, w_table, g_table, moved,
             saved, v, u, m, kept, sums):
        inv_scale, c = control[INV_SCALE2], control[C]
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
                if gsam and returns:
                    g = g - alpha * (load(kept_at, i, "kept", A) - c * g)
                if renews and returns:
                    store(m_at, i, g - c * load(kept_at, i, "kept", A), "m", A)
                if reuses:
                    g = g + alpha * (c * load(m_at, i, "m", A))
                g = g + weight_decay * w if adds else g
                w = w * shrink
                first = beta1 * load(v_at, i, "v", A) + share1 * g
                second = beta2 * load(u_at, i, "u", A) + share2 * g * g
                store(v_at, i, first, "v", A)
                store(u_at, i, second, "u", A)
                w = w - rate * first / (math.sqrt(second / c2) + eps)
                store(w_at, i, w, "w", W)
                if masters:
                    store(saved_at, i, w, "old", A)
            if along_v and returns:
                sums[0, block] = squares(v_at, n, size, A)

    return loop
