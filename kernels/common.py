"""What the kernels share: sizes, table columns, and how a block finds its memory.

K0 to K3 run as at most PARTIALS programs; each walks blocks p, p + programs, ... of BLOCK
elements. A block belongs to one slot (fastsam.flat.Slot). Its gradient and weight are reached
through an int64 table of addresses (0: none); the flat buffers (saved w, m, v) by its offset.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024
WARPS = 4
PARTIALS = 1024
# Fusion off, so that a product and a sum round twice, as in plain PyTorch; the kernels wait for
# memory. Without a bound of its own, ptxas spills accumulators to fit one more program.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
if not torch.version.hip:
    OPTIONS["maxnreg"] = 128
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# columns of the hyper-parameter table: fastsam.flat.Hyper, then SHARES; 5 and 12 no kernel reads
RHO, SIGMA, LMBDA, LR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
MOMENTUM, WEIGHT_DECAY, NESTEROV = tl.constexpr(4), tl.constexpr(6), tl.constexpr(7)
BETA1, BETA2, EPS, DECOUPLED = (
    tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11))
EMA_SHARE, MOMENTUM_SHARE = tl.constexpr(13), tl.constexpr(14)  # 1 - lmbda, 1 - dampening
BETA1_SHARE, BETA2_SHARE = tl.constexpr(15), tl.constexpr(16)  # 1 - beta
LOG_BETA1, LOG_BETA2, HYPER = tl.constexpr(17), tl.constexpr(18), tl.constexpr(19)
# cells of the control buffer and of the counters, fastsam.flat.CONTROL and COUNTERS
NORM, OK, INV_SCALE1, INV_SCALE2 = (
    tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3))
FOUND_INF = tl.constexpr(4)
SKIPPED, CLIMB_TICKET, STEP_TICKET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# the direction: g (SAM), g less the new m, g less the m of the step before, the part of g along a
# given m, or the rest
PLAIN, ALGORITHM1, OFFICIAL, FULL, NOISE = (
    tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4))
MODES = {None: 0, "algorithm1": 1, "official": 2, "full": 3, "noise": 4}
# the scaling T: 1, a |w| + b, or 1 / sqrt(1 + a g^2)
UNSCALED, WEIGHTS, GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SCALINGS = {None: 0, "weights": 1, "gradient": 2}


def launching_on(space) -> torch.cuda.device_of:
    """A context in which kernels launch on the space's own GPU, whichever is current."""
    return torch.cuda.device_of(space.partials)


@triton.jit
def locate(block, blocks, layout, BLOCK: tl.constexpr):
    """The block's slot, its start in the slot and in the flat space, its length, its group."""
    slot = tl.load(blocks + 2 * block)
    start = tl.load(blocks + 2 * block + 1).to(tl.int64) * BLOCK
    offset = tl.multiple_of(tl.load(layout + 3 * slot), 4)  # what wide_pointer says of 16 bits
    length = tl.load(layout + 3 * slot + 1) - start
    group = tl.load(layout + 3 * slot + 2)
    return slot, start, offset + start, length, group


@triton.jit
def pointer(address, TYPE: tl.constexpr):
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def wide_pointer(address, TYPE: tl.constexpr):
    """A pointer that the compiler may load from in wide pieces; only for address % 16 == 0.

    For 16-bit types the hint is 8: 64-bit loads beside 128-bit float32 ones keep every thread's
    elements the same, so nothing passes through shared memory. The hint must follow the cast.
    """
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)),
                          16 if TYPE.primitive_bitwidth == 32 else 8)


@triton.jit
def read(pointers, mask):
    """The elements at `pointers`, 0 where the mask (None: no mask) is off."""
    if mask is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask, 0)
    return values


@triton.jit
def weights(w_ptr, master_ptr, mask, MASTERS: tl.constexpr):
    """w as it is stored, and in float32: the master where there are masters, unless someone else
    has written another w since."""
    w_in = read(w_ptr, mask)
    w = w_in.to(tl.float32)
    if MASTERS:
        master = read(master_ptr, mask)
        w = tl.where(master.to(w_in.dtype).to(tl.float32) == w, master, w)
    return w_in, w


@triton.jit
def is_last_program(ticket):
    """Whether every other program has come this far: the last one may change what they read."""
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
    last = arrived == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.runtime.jit.JITFunction)
