"""What the instructions compute: functions of NumPy arrays, by opcode.

A register is an array of unsigned words, one for each thread (of bools for a predicate); `decode`
and `encode` go between its bits and the numbers of an instruction's type.
"""

import numpy as np

from .faults import UnknownInstruction

SIZES = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
SIGNED = {"8": np.int8, "16": np.int16, "32": np.int32, "64": np.int64}
FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16}


def word(kind: str) -> type:
    """The unsigned type that holds one value of this PTX type."""
    if kind == "pred":
        return np.bool_
    if kind in ("bf16", "f16"):
        return np.uint16
    if kind in ("bf16x2", "f16x2"):
        return np.uint32
    if kind[0] not in "bsuf" or kind[1:] not in SIZES:
        raise UnknownInstruction(f"type .{kind}")
    return SIZES[kind[1:]]


def decode(bits, kind: str):
    """The numbers that words stand for; 16-bit floats as float32, which holds them all."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind in FLOATS:
        return bits.view(FLOATS[kind])
    if kind[0] == "s":
        return bits.view(SIGNED[kind[1:]])
    return bits


def encode(values, kind: str):
    """Words for numbers, rounded to nearest even where they are floats."""
    if kind == "bf16":
        return bfloat16(np.asarray(values, np.float32))
    if kind in FLOATS:
        return np.asarray(values, FLOATS[kind]).view(word(kind))
    return np.asarray(values).astype(word(kind))


def bfloat16(values):
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


# ---- one result of one type


def minimum(a, b):
    """PTX has -0 below +0."""
    return np.where((a == b) & np.signbit(a), a, np.minimum(a, b))


def maximum(a, b):
    return -minimum(-a, -b)


def min_xorsign_abs(a, b):
    sign = np.signbit(a) ^ np.signbit(b)
    return np.copysign(np.minimum(abs(a), abs(b)), np.where(sign, -1, 1).astype(a.dtype))


def shift_left(a, by):
    width = a.dtype.itemsize * 8
    return np.where(by < width, a << np.minimum(by, width - 1).astype(a.dtype), 0)


def shift_right(a, by):
    width = a.dtype.itemsize * 8
    kept = a >> np.minimum(by, width - 1).astype(a.dtype)
    return kept if a.dtype.kind == "i" else np.where(by < width, kept, 0)


def quotient(a, b):
    """Rounded towards 0."""
    found = a // b
    return found + ((found < 0) & (found * b != a)).astype(found.dtype)


def wide(a, b):
    double = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return np.asarray(a).astype(double) * np.asarray(b).astype(double)


def bit_field(a, start, length):
    """`length` bits of an unsigned word from `start` on."""
    if a.dtype.kind != "u":
        raise UnknownInstruction("bfe of a signed word")
    bits = a.astype(np.uint64) >> start.astype(np.uint64)
    return (bits & (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(a.dtype)


def exponential2(a):
    """Of an approximate instruction, the exact result."""
    return np.exp2(a.astype(np.float64)).astype(np.float32)


INTEGERS = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "mul.wide": wide,
    "mad.lo": lambda a, b, c: a * b + c, "mad.wide": lambda a, b, c: wide(a, b) + c,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "neg": np.negative, "min": np.minimum, "max": np.maximum, "abs": abs,
    "div": quotient, "rem": np.fmod, "shl": shift_left, "shr": shift_right,
    "bfe": bit_field,
}
REALS = {
    "add.rn": np.add, "sub.rn": np.subtract, "mul.rn": np.multiply, "add": np.add,
    "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": abs,
    "div.rn": np.divide, "div.full": np.divide, "sqrt.rn": np.sqrt, "ex2.approx": exponential2,
    "min": lambda a, b: np.where(np.isnan(a), b, np.where(np.isnan(b), a, minimum(a, b))),
    "max": lambda a, b: np.where(np.isnan(a), b, np.where(np.isnan(b), a, maximum(a, b))),
    "min.NaN": minimum, "max.NaN": maximum, "min.NaN.xorsign.abs": min_xorsign_abs,
}
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
         "not": np.logical_not}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
           "gt": np.greater, "ge": np.greater_equal}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def is_float(kind: str) -> bool:
    return kind in ("f16", "bf16", "f32", "f64")


def function(opcode: tuple[str, ...]):
    """The function of the numbers, for instructions with one type and one result."""
    *name, kind = opcode
    table = LOGIC if kind == "pred" else REALS if is_float(kind) else INTEGERS
    found = table.get(".".join(name))
    if found is None:
        raise UnknownInstruction(".".join(opcode))
    return found


def compare(how: str, kind: str, a, b):
    """A comparison of floats is false with NaN, or true where its name ends with u."""
    if not is_float(kind):
        return COMPARE[UNSIGNED.get(how, how)](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    if how[:2] not in COMPARE or how[2:] not in ("", "u"):
        raise UnknownInstruction(f"setp.{how}.{kind}")
    return COMPARE[how[:2]](a, b) & ~unordered | unordered & how.endswith("u")


def convert(how: tuple[str, ...], to: str, values):
    """cvt of one value: exact, or rounded as `how` says."""
    source_is_float = values.dtype.kind == "f"
    if is_float(to) and how in ((), ("rn",)):
        return encode(values, to)
    if how == () and not source_is_float:
        return values.astype(word(to))
    raise UnknownInstruction(f"cvt.{'.'.join(how)}.{to}")
