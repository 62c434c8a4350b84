"""What the kernels share: sizes, table columns, and how a block finds its memory.

Each runs as at most PROGRAMS programs, so that a launch is one wave on an A100 and all larger GPUs:
with 80 registers six programs fit on a multiprocessor, of which an A100 has 108. The number does
not follow the GPU, so the sums have the same bits on all; smaller ones take more waves.
A program walks a contiguous range of blocks, slot (fastsam.space.Slot) by slot. A slot's gradient
and weight are reached through an int64 table of addresses (0: none); the flat buffers (saved w, m,
v, u, kept g) by its offset.
"""

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from ...hyper import COLUMN, COLUMNS
from ...space import CONTROL, COUNTERS

BLOCK = 1024
PROGRAMS = 640
WARPS = 4
SUMS = tl.constexpr(4 * 32 * WARPS)  # four side by side for each thread
# Fusion off, so that a product and a sum round twice, as in plain PyTorch; the kernels wait for
# memory. Without a bound of its own, ptxas spills accumulators to fit one more program.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
if not torch.version.hip:
    OPTIONS["maxnreg"] = 80
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

HYPER = tl.constexpr(len(COLUMNS))
RHO, SIGMA, LMBDA, EMA_SHARE, LR, WEIGHT_DECAY, MOMENTUM, MOMENTUM_SHARE, NESTEROV = (
    tl.constexpr(COLUMN[name]) for name in (
        "rho", "sigma", "lmbda", "ema_share", "lr", "weight_decay", "momentum", "momentum_share",
        "nesterov"))
ALPHA = tl.constexpr(COLUMN["alpha"])
BETA1, BETA1_SHARE, LOG_BETA1, BETA2, BETA2_SHARE, LOG_BETA2, EPS, DECOUPLED = (
    tl.constexpr(COLUMN[name]) for name in (
        "beta1", "beta1_share", "log_beta1", "beta2", "beta2_share", "log_beta2", "eps",
        "decoupled"))
NORM, OK, INV_SCALE1, INV_SCALE2, FOUND_INF, SHARE = (
    tl.constexpr(CONTROL.index(name)) for name in (
        "norm", "ok", "inv_scale1", "inv_scale2", "found_inf", "share"))
SKIPPED, CLIMB_TICKET, STEP_TICKET = (
    tl.constexpr(COUNTERS.index(name)) for name in ("skipped", "climb_ticket", "step_ticket"))

# Kind.mode, the direction: g (SAM), g less the new m, g less the m of the step before, the part of
# g along a given m, or the rest
PLAIN, ALGORITHM1, OFFICIAL, FULL, NOISE = (
    tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4))
# g too, and it is kept for the second pass
KEPT = tl.constexpr(-1)
MODES = {None: 0, "algorithm1": 1, "official": 2, "full": 3, "noise": 4, "gsam": -1, "looksam": -1}
# what the base steps with: fastsam.passes.Pass.mix
UNMIXED, GSAM, RENEW, REUSE = (
    tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3))
MIXES = {None: 0, "gsam": 1, "renew": 2, "reuse": 3}
# the scaling T: 1, a |w| + b, or 1 / sqrt(1 + a g^2)
UNSCALED, WEIGHTS, GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SCALINGS = {None: 0, "weights": 1, "gradient": 2}

# Addresses that a kernel reads single numbers at, and counts: nothing to compile for each anew.
jit = triton.jit(
    do_not_specialize=("n_blocks", "n_slots"),
    do_not_specialize_on_alignment=("w_table", "g_table", "climbed_table", "m_steps", "v_steps"))


def options(arch: int | str) -> dict:
    """How to compile for this GPU, as Triton names it. From compute capability 10.0 on the
    large ones have so many multiprocessors that five programs on each are all PROGRAMS, with more
    registers each."""
    newer = "maxnreg" in OPTIONS and isinstance(arch, int) and arch >= 100
    return OPTIONS | {"maxnreg": 96} if newer else OPTIONS


@triton.jit
def share_of_blocks(n_blocks):
    """This program's blocks, [first, last): as even as whole blocks allow."""
    program = tl.program_id(0)
    each, more = n_blocks // tl.num_programs(0), n_blocks % tl.num_programs(0)
    first = program * each + tl.minimum(program, more)
    return first, first + each + (program < more).to(tl.int32)


@triton.jit
def run_of_blocks(block, last, blocks, layout, BLOCK: tl.constexpr):
    """What lies from `block` on in one slot: the slot and its group, where in the slot and in the
    flat space it begins, its elements, and the blocks that hold them, which are before `last`."""
    slot = tl.load(blocks + 2 * block)
    begin = tl.load(blocks + 2 * block + 1).to(tl.int64) * BLOCK
    offset = tl.load(layout + 3 * slot)
    left = tl.load(layout + 3 * slot + 1) - begin
    group = tl.load(layout + 3 * slot + 2)
    size = tl.minimum(left, (last - block).to(tl.int64) * BLOCK).to(tl.int32)
    return slot, group, begin, offset + begin, size, tl.cdiv(size, BLOCK)


@triton.jit
def from_element(address, n, TYPE: tl.constexpr):
    """The address of the n-th element."""
    return address + n * (TYPE.primitive_bitwidth // 8)


@triton.jit
def in_fours(size, addresses):
    """How many of the elements can be had in fours: all whole ones, where all addresses are
    multiples of 16; else none."""
    return tl.multiple_of(tl.where(addresses % 16 == 0, size // 4 * 4, 0), 4)


@triton.jit
def pointer(address, TYPE: tl.constexpr):
    """A pointer of which the compiler knows nothing. It lays out alike what has one shape: beside
    no wide pointer of its shape, nor a `wide_place`, neighbouring threads get neighbouring
    elements, and a warp whole sectors."""
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
def wide_place(flat):
    """A place in the flat buffers, all of which are multiples of 4, so that the compiler knows."""
    return flat // 4 * 4


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
    """w as it is stored, w in float32, and where that is not yet in memory: it is the master where
    there are masters, unless someone else has written another w since."""
    w_in = read(w_ptr, mask)
    w = w_in.to(tl.float32)
    taken = mask
    if MASTERS:
        master = read(master_ptr, mask)
        known = master.to(w_in.dtype).to(tl.float32) == w
        taken = mask & (known == 0)
        w = tl.where(known, master, w)
    return w_in, w, taken


@triton.jit
def folded(x, SUMS: tl.constexpr):
    """SUMS sums of a block: of its stretches of SUMS elements, each thread's own, so that fewer
    registers carry them from block to block."""
    return tl.sum(tl.reshape(x, (x.shape[0] // SUMS, SUMS)), 0)


@triton.jit
def store_sum(sums, x, PARTIALS: tl.constexpr):
    """sums[program] = the sum of x, and 0 for the programs that there are not: another launch, with
    more of them, or another rank may have left its own there."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(sums + program, x)
    others = program + programs * (1 + tl.arange(0, PARTIALS))
    tl.store(sums + others, 0.0, others < PARTIALS)


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


def takes(device: torch.device) -> bool:
    """Whether the kernels run on this device's tensors: on a GPU's, in the interpreter on any (but
    not at addresses of a GPU's memory), and on what Triton's driver calls its own."""
    if INTERPRETED or device.type == "cuda":
        return True
    try:
        return device.type == driver.active.get_active_torch_device().type
    except Exception:
        # There is no driver (RuntimeError), or it cannot start, for which each vendor's raises what
        # it likes: a C compiler's CalledProcessError, a library's OSError, an AssertionError.
        return False
