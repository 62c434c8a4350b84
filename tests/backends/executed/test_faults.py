"""Every check of the executed code can fail: the code is changed, and the fault is named."""

import re

import pytest
import torch

from ...helpers.drawn import normals
from ...helpers.ptx.faults import (
    Divergence,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialised,
    UnknownInstruction,
)
from .steps import BLOCK, Steps, gaps

SIZES = [2 * BLOCK + 52, 17]


def step(executed) -> list:
    steps = Steps(normals(SIZES), momentum=0.9, weight_decay=0.1)
    executed.gaps[:] = gaps(steps.opt)
    return steps.run(SIZES, steps=1)


def change(executed, kernel: str, pattern: str, to: str, which: int | None = None) -> None:
    """Replace the pattern in that kernel's PTX: everywhere, or only its `which`-th occurrence."""
    def rewrite(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        found = list(re.finditer(pattern, ptx))
        assert found, f"{pattern!r} is nowhere in {kernel}"
        for m in reversed(found if which is None else [found[which]]):
            ptx = ptx[:m.start()] + m.expand(to) + ptx[m.end():]
        return ptx

    executed.rewrite = rewrite


def count(executed, kernel: str, pattern: str) -> int:
    found = []
    executed.rewrite = lambda name, ptx: (
        found.append(len(re.findall(pattern, ptx))) if name == kernel else None) or ptx
    step(executed)
    return found[0]


def test_unchanged_code_has_no_fault(executed):
    step(executed)


@pytest.mark.parametrize("kernel, pattern, to", [
    ("norm_kernel", r"sub\.rn\.f32", "add.rn.f32"),
    ("climb_kernel", r"sub\.rn\.f32", "add.rn.f32"),
    ("climb_kernel", r"sqrt\.rn\.f32", "neg.f32"),
    ("step_kernel", r"add\.rn\.f32", "sub.rn.f32"),
])
def test_a_flipped_instruction_shows_in_the_numbers(executed, kernel, pattern, to):
    expected = step(executed)
    change(executed, kernel, pattern, to)
    assert not all(torch.equal(a, b) for a, b in zip(step(executed), expected, strict=True))


@pytest.mark.parametrize("kernel", ["norm_kernel", "climb_kernel"])
def test_every_barrier_that_is_dropped_leaves_a_race(executed, kernel):
    barriers = count(executed, kernel, r"bar\.sync[^;]*;")
    assert barriers
    for which in range(barriers):
        change(executed, kernel, r"bar\.sync[^;]*;", "", which)
        with pytest.raises(Race):
            step(executed)


def test_warps_one_by_one_meet_the_missing_barrier_itself(executed):
    """Not only does nothing order the accesses: a warp reads what another has yet to write."""
    change(executed, "norm_kernel", r"bar\.sync[^;]*;", "")
    executed.together = False
    try:
        with pytest.raises((Race, Uninitialised)):
            step(executed)
    finally:
        executed.together = True


@pytest.mark.parametrize("weaker", ["atom.global.gpu.relaxed.add", "atom.global.gpu.acquire.add",
                                    "atom.global.gpu.release.add", "atom.global.cta.acq_rel.add"])
@pytest.mark.parametrize("kernel", ["climb_kernel", "step_kernel"])
def test_a_weaker_ticket_leaves_a_race_between_programs(executed, kernel, weaker):
    change(executed, kernel, r"atom\.global\.gpu\.acq_rel\.add", weaker)
    with pytest.raises(Race):
        step(executed)


def test_a_missing_mask_reads_beyond_the_tensor(executed):
    change(executed, "norm_kernel", r"@%p\d+ (ld\.global)", r"\1")
    with pytest.raises(OutOfBounds, match="g_table"):
        step(executed)


def test_a_missing_mask_writes_beyond_the_tensor(executed):
    change(executed, "step_kernel", r"@%p\d+ (st\.global)", r"\1")
    with pytest.raises(OutOfBounds):
        step(executed)


def test_a_gap_between_two_parameters_parts_is_nobody_s(executed):
    """Beyond the slot's end, but within the flat buffer."""
    wide = r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+) 0 \]"
    which = count(executed, "norm_kernel", wide) - 1  # m's, the last in the text
    change(executed, "norm_kernel", wide, r"\1 4096 ]", which)
    with pytest.raises((OutOfBounds, Race)):
        step(executed)


@pytest.mark.parametrize("offset, fault", [(4, Misaligned), (8, Misaligned), (8192, OutOfBounds)])
@pytest.mark.parametrize("kernel", ["norm_kernel", "climb_kernel", "step_kernel"])
def test_an_offset_pointer_is_misaligned_or_beyond(executed, kernel, offset, fault):
    change(executed, kernel, r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+) 0 \]",
           rf"\1 {offset} ]", 0)
    with pytest.raises(fault):
        step(executed)


def test_an_address_of_another_tensor_is_not_this_one_s(executed):
    """Both lie in living memory; a lucky offset leads from one to the other."""
    steps = Steps(normals(SIZES), momentum=0.9)
    a, b = (p.data_ptr() for p in steps.params)
    change(executed, "norm_kernel", r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+) 0 \]",
           rf"\1 {(b - a) // 16 * 16} ]", 0)
    with pytest.raises(OutOfBounds):
        steps.climb(normals(SIZES))


def test_shared_memory_that_nobody_wrote(executed):
    change(executed, "norm_kernel", r"st\.shared\S* [^;]*;", "")
    with pytest.raises(Uninitialised):
        step(executed)


def test_a_register_that_nobody_wrote(executed):
    change(executed, "norm_kernel", r"mov\.b32 +\t?(%r\d+), 0f00000000;|shl\.b32[^;]*;", "", 0)
    with pytest.raises(Uninitialised):
        step(executed)


def test_threads_that_part_within_a_warp(executed):
    change(executed, "norm_kernel", r"@!?%p\d+ (bra[^;]*;)",
           r"setp.gt.u32 %p0, %tid.x, 15;\n @%p0 \1", 0)
    with pytest.raises(Divergence):
        step(executed)


def test_a_warp_that_never_comes_to_the_barrier(executed):
    change(executed, "norm_kernel", r"(bar\.sync[^;]*;)",
           "setp.gt.u32 %p0, %tid.x, 63;\n @%p0 bra $skip;\n \\1\n $skip:", 0)
    with pytest.raises(Divergence):
        step(executed)


@pytest.mark.parametrize("pattern, to", [
    (r"sqrt\.rn\.f32", "sqrt.approx.f32"), (r"add\.rn\.f32", "add.rn.ftz.f32"),
    (r"bar\.sync", "bar.arrive"), (r"ld\.global\.b32", "ld.global.nc.b32"),
    (r"shfl\.sync\.bfly", "shfl.sync.down"),
])
def test_an_unknown_instruction_is_an_error(executed, pattern, to):
    change(executed, "climb_kernel", pattern, to)
    with pytest.raises(UnknownInstruction):
        step(executed)
