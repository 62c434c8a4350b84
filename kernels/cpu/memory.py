"""A loop's reads and writes of memory, by address: what numba has no words for.

A value is loaded into the precision of the arithmetic and rounded when it is stored. What an access
touches is said by its stream, of which no two overlap.
"""

from llvmlite import ir
from numba import float32, float64, int64, types
from numba.core import cgutils
from numba.extending import intrinsic

CHUNK = 1024  # elements whose squares wait in the first cache to be added up
LINE = 64  # bytes, of a cache
TILE = 64  # elements that wait there to be written past the caches: many at once hold up the reads
LANES = 16  # partial sums, so that adding up in a fixed order is done in vectors
# Buffers that do not overlap, or where `old` is w, only element by element: so a loop over them
# may be done in vectors without a look at where they are.
STREAMS = ("w", "g", "old", "saved", "m", "v", "u", "kept", "x", "y", "z")

# a stored number in LLVM's words, and one of the arithmetic in numba's
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


@intrinsic
def pointer(context, address):
    """An address as a pointer to anything."""
    def generate(_, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(int64), generate


def reader(bits: int):
    """A function of numba's: (address, i) -> entry i of the integers of these bits there."""
    @intrinsic
    def entry(context, address, i):
        def generate(_, builder, signature, args):
            value = builder.load(locate(builder, *args, ir.IntType(bits)))
            return builder.sext(value, ir.IntType(64)) if bits < 64 else value

        return int64(address, i), generate

    return entry


address_in, count_in = reader(64), reader(32)  # of a table's addresses, and of m_steps or v_steps


@intrinsic
def add_one(context, steps, i):
    """steps[i] += 1. Returns i."""
    def generate(_, builder, signature, args):
        place = locate(builder, *args, FULL)
        builder.store(builder.add(builder.load(place), FULL(1)), place)
        return args[1]

    return int64(steps, i), generate


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
    """Element i of the stream at this address = value, rounded. Returns i, as it has to return
    something."""
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


@intrinsic(prefer_literal=True)
def put_past_caches(context, target, source, n, stream):
    """n bytes at target, a multiple of LINE, = those at source. They go to the memory at once, and
    what they replace is not read into a cache. Others see them after a `fence`. Returns n."""
    def generate(_, builder, signature, args):
        start, there, count = args[:3]
        line, byte = ir.VectorType(FULL, LINE // 4), ir.IntType(8)

        def copy(kind: ir.Type, i: ir.Value, align: int) -> ir.Instruction:
            value = builder.load(locate(builder, there, i, kind), align=align)
            write = builder.store(value, locate(builder, start, i, kind), align=align)
            for access in (value, write):
                part_from_others(builder, access, stream.literal_value)
            return write

        lines = builder.udiv(count, count.type(LINE))
        done = builder.mul(lines, count.type(LINE))
        once = builder.module.add_metadata([FULL(1)])
        with cgutils.for_range(builder, lines) as loop:
            copy(line, loop.index, LINE).set_metadata("nontemporal", once)
        with cgutils.for_range(builder, builder.sub(count, done)) as loop:
            copy(byte, builder.add(done, loop.index), 1)
        return count

    return int64(target, source, n, stream), generate


@intrinsic
def fence(context, x):
    """Let what was written past the caches be seen by all who see what is written later. Returns x.
    """
    def generate(_, builder, signature, args):
        builder.fence("seq_cst")
        return args[0]

    return x(x), generate


@intrinsic
def take(context, ticket):
    """The number of a block that no other thread has."""
    def generate(context, builder, signature, args):
        cell = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", cell, ir.IntType(64)(1), "monotonic")

    return int64(ticket), generate
