"""The three passes on a CPU: blocks of memory dealt to threads that run the loops."""

import math
from collections.abc import Iterable
from ctypes import Array, addressof, c_int64
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from fastsam.hyper import FRIENDLY, WITH_M
from fastsam.interrupts import surely
from fastsam.memory import table_of
from fastsam.passes import Climb, Pass
from fastsam.reference import taking_part, weights
from fastsam.space import CONTROL, COUNTERS, Space, noise_share

from .climb import climb_loop
from .counts import count_loop
from .norm import dots_loop, norm_loop
from .step import step_loop
from .tables import ARGUMENTS, BLOCK, BLOCKS, COUNTED, NORM, OWN, STEPS, TICKET, Loop
from .threads import run_in

INLINE = 2**17  # elements: from there on a second thread pays; for each half of it more, another
# elements of a space, from where on what is not read again within the step, the saved weights and
# the new ones, is written past the caches, which have no room for it
PAST_CACHES = 2**22
OK, FOUND_INF, SKIPPED = *map(CONTROL.index, ("ok", "found_inf")), COUNTERS.index("skipped")
DTYPES = {torch.float32: "f4", torch.float64: "f8", torch.bfloat16: "bf16", torch.float16: "f16"}


class Frame(NamedTuple):
    """A space's tables as NumPy sees them, room for each block's sums, and its loops' arguments."""

    control: np.ndarray
    counters: np.ndarray
    partials: np.ndarray
    dots: np.ndarray
    radii: np.ndarray
    sums: np.ndarray
    arguments: Array[c_int64]

    @staticmethod
    def of(space: Space) -> "Frame":
        blocks, layout, hyper, scalings = tables = (space.blocks(BLOCK), space.layout, space.hyper,
                                                    space.scalings)
        sums, arguments = np.zeros((3, len(blocks))), (c_int64 * ARGUMENTS)()
        blocks_at, layout_at, hyper_at, scalings_at = (t.data_ptr() for t in tables)
        arguments[BLOCKS:STEPS] = [
            blocks_at, len(blocks), layout_at, len(layout), hyper_at, len(hyper), scalings_at,
            space.control.data_ptr(), sums.ctypes.data]
        return Frame(*(t.numpy() for t in (space.control, space.counters, space.partials,
                                           space.dots, space.radii)), sums, arguments)


FRAMES: WeakKeyDictionary[Space, Frame] = WeakKeyDictionary()


def frame_of(space: Space) -> Frame:
    frame = FRAMES.get(space)
    if frame is None:
        frame = FRAMES[space] = Frame.of(space)
    return frame


def run(loop: Loop, p: Pass, f: Frame, steps: int, *own: int) -> None:
    """Run a loop over all blocks of the space, in as many threads as torch would use.

    Args:
        steps: the address of m_steps or v_steps.
        own: the loop's own arguments.
    """
    f.arguments[TICKET], f.arguments[COUNTED] = 0, 0
    f.arguments[STEPS:OWN + len(own)] = [steps, p.w_table.data_ptr(), p.g_table.data_ptr(), *own]
    threads = min(torch.get_num_threads(), p.space.size * 2 // INLINE, f.sums.shape[1])
    run_in(threads, loop, addressof(f.arguments))


def dtypes(p: Pass) -> tuple[str, str]:
    return DTYPES[p.space.kind.dtype], DTYPES[p.g_dtype]


def address(flat: Tensor | None) -> int:
    return 0 if flat is None else flat.data_ptr()


def count(p: Pass, f: Frame, by_momentum: bool) -> None:
    """Count what the last loop has updated, once (see `count_loop`)."""
    count_loop(by_momentum, dtypes(p)[0]).call(addressof(f.arguments))


def put(cells: np.ndarray, sums: np.ndarray) -> None:
    """cells[i] = the parts of the sum of sums[i]: a single one, added up in a fixed order."""
    cells[...] = 0
    cells[:, 0] = np.add.reduce(sums[:len(cells)], 1)


def dots(p: Pass) -> None:
    """space.dots = the parts of <g, m>, <g, g> and <m, m>. m is that of the projection; in a second
    pass with a `mix`, the kept gradient, or m."""
    s, f = p.space, frame_of(p.space)
    loop = dots_loop(s.kind.mode, *dtypes(p))
    m = s.kept if p.mix in ("gsam", "renew") else s.m
    run(loop, p, f, s.steps.data_ptr(), address(m))
    put(f.dots, f.sums)


def norm(p: Pass) -> None:
    """space.partials = the parts of ||T d||^2 and, where d is made with m, of ||T g||^2."""
    s, kind, f = p.space, p.space.kind, frame_of(p.space)
    loop = norm_loop(kind.mode, p.scaling, kind.masters, *dtypes(p))
    run(loop, p, f, s.steps.data_ptr(), address(s.saved), address(s.m))
    put(f.partials, f.sums)


def climb(p: Pass, sums: Tensor) -> Climb:
    """w -> w + rho T^2 d / ||T d||, with w saved and m updated.

    Args:
        sums: (2, k), what `norm` left of every space of the optimizer, so the norm is global.
    """
    s, kind, f = p.space, p.space.kind, frame_of(p.space)
    of_d, of_g = f.partials[:, 0] if sums is s.partials else sums.sum(1).numpy()
    f.control[NORM] = total = np.sqrt(of_d)
    f.control[OK] = math.isfinite(total)
    if not math.isfinite(total):
        return stay(p)
    moves = bool(kind.mode not in WITH_M or of_d > noise_share(sums.dtype) * of_g)
    loop = climb_loop(kind.mode, p.scaling, kind.masters, *dtypes(p))
    steps, m = s.steps.data_ptr(), s.m if s.kept is None else s.kept
    f.arguments[TICKET] = 0  # also where a Ctrl-C comes before `run`
    try:
        surely(lambda: run(loop, p, f, steps, address(s.saved), address(m), moves,
                           s.size >= PAST_CACHES),
               lambda: count(p, f, False) if kind.mode in FRIENDLY else None)
        put(f.radii, f.sums)
        return Climb.of(p)
    except BaseException:
        if f.arguments[TICKET]:  # else nothing is saved yet
            go_back(p, Climb.of(p).moved)
        raise


def stay(p: Pass) -> Climb:
    """A climb that moves nothing: w is saved, or a master brought up to date."""
    for i, slot, _ in taking_part(p):
        slot.saved.copy_(weights(p, i))
    p.space.radii.zero_()
    return Climb.of(p)


def go_back(p: Pass, which: Iterable[bool]) -> None:
    """w = saved w in those slots."""
    for slot, w, one in zip(p.space.slots, p.w, which, strict=True):
        if one:
            w.copy_(slot.saved)


def step(p: Pass, climb: Climb | None) -> None:
    """The base optimizer from the saved w (from w itself where nothing was saved) with the
    second-pass gradient.

    A slot with no second-pass gradient only returns. After a climb that was not ok, or with the
    cell `found_inf` set, every slot only returns, and the skip is counted. With `along_v`,
    ||v||^2 is left for the next climb.
    """
    s, kind, f = p.space, p.space.kind, frame_of(p.space)
    moved = [False] * len(p.g) if climb is None else climb.moved
    if f.control[FOUND_INF] != 0 or (climb is not None and f.control[OK] == 0):
        f.counters[SKIPPED] += 1
        go_back(p, moved)
        if p.along_v:
            v = [slot.v if one else None for slot, one in zip(s.slots, moved, strict=True)]
            norm(p._replace(g_table=torch.tensor(table_of(v), device="cpu"),
                            g_dtype=kind.acc))
        return
    go_back(p, [one and g is None for one, g in zip(moved, p.g, strict=True)])
    loop = step_loop(kind.base, p.mix, p.along_v, kind.masters, *dtypes(p))
    steps = s.steps.data_ptr() + 4 * len(s.slots)  # those of v
    f.arguments[TICKET] = 0  # also where a Ctrl-C comes before `run`
    surely(lambda: run(loop, p, f, steps, 0 if climb is None else climb.table.data_ptr(),
                       *map(address, (s.saved, s.v, s.u, s.m, s.kept)), s.size >= PAST_CACHES),
           lambda: count(p, f, kind.base != "adam"))
    if p.along_v:
        put(f.partials, f.sums)
