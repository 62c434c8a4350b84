"""The 32-byte sectors that every warp asks for, against the design's bytes per parameter."""

import pytest
import torch

from fastsam import ASAM, SAM, FriendlySAM
from fastsam.kernels import triton as kernels

from ...helpers.drawn import normals
from .steps import BLOCK, Steps

SIZES = [6 * BLOCK, 2 * BLOCK]
ELEMENTS = sum(SIZES)
SECTOR = 32
# (read, written) bytes per float32 parameter: norm, climb, step; design's table
BUDGET = {
    "sam": ((4, 0), (8, 8), (12, 8)),
    "asam": ((8, 0), (8, 8), (12, 8)),
    "fsam": ((8, 0), (12, 12), (12, 8)),
    "adamw": ((4, 0), (8, 8), (16, 12)),
}
RUNS = {
    "sam": dict(cls=SAM, momentum=0.9),
    "asam": dict(cls=ASAM, momentum=0.9),
    "fsam": dict(cls=FriendlySAM, momentum=0.9),
    "adamw": dict(cls=SAM, base=torch.optim.AdamW),
}
STREAMS = ("m", "v", "u", "saved")  # and what the tables lead to


def moved(sectors, way: str) -> int:
    """Bytes of the parameters' own streams."""
    return SECTOR * sum(n for (label, kind), n in sectors.items()
                        if kind == way and (label in STREAMS or label[0] == "*"))


def traffic(executed, dtype=torch.float32, offset=0, **kwargs) -> list:
    """Of a step, with gradients `offset` elements beyond a multiple of 64 bytes."""
    steps = Steps(normals(SIZES, dtype=dtype), **kwargs)
    executed.traffic.clear()  # the first optimizer of all has tried a kernel
    steps.climb(normals(SIZES, 1, dtype), offset)
    steps.step(normals(SIZES, 2, dtype), offset)
    return executed.traffic


@pytest.mark.parametrize("name", RUNS)
def test_every_kernel_moves_its_budget_in_float32(executed, name):
    found = traffic(executed, **RUNS[name])
    assert [kernel for kernel, _ in found] == ["norm_kernel", "climb_kernel", "step_kernel"]
    for (kernel, sectors), (read, written) in zip(found, BUDGET[name], strict=True):
        assert moved(sectors, "read") == read * ELEMENTS, kernel
        assert moved(sectors, "written") == written * ELEMENTS, kernel


@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
def test_every_kernel_moves_its_budget_in_16_bits(executed, masters):
    """g, w and the saved w have two bytes, m and v four, and so have masters, which are the saved
    w: the climb reads them and writes only those that it takes over."""
    found = traffic(executed, torch.bfloat16, momentum=0.9, master_weights=masters)
    budget = (((6, 0), (12, 6), (10, 10)) if masters else ((6, 0), (8, 8), (8, 6)))
    for (kernel, sectors), (read, written) in zip(found, budget, strict=True):
        assert moved(sectors, "read") == read * ELEMENTS, kernel
        assert moved(sectors, "written") == written * ELEMENTS, kernel


def test_pgd_reads_three_images_and_writes_one(executed):
    x = torch.rand(4, 2 * BLOCK)
    kernels.linf_step(x.clone(), torch.randn_like(x), x, 0.1, 0.05)
    (_, sectors), = executed.traffic
    assert SECTOR * sectors["x_adv", "written"] == 4 * x.numel()
    for name in ("x_adv", "g", "x"):
        assert SECTOR * sectors[name, "read"] == 4 * x.numel()


def test_what_is_misaligned_is_asked_for_in_whole_sectors(executed):
    """One by one, the elements of a warp reach into a sector more than they fill, which the
    first-level cache holds for the next: a quarter more than the memory gives."""
    found = traffic(executed, offset=1, **RUNS["fsam"])
    for (kernel, sectors), (read, written) in zip(found, BUDGET["fsam"], strict=True):
        assert SECTOR * sectors["*g_table", "read"] == 5 * ELEMENTS, kernel
        assert moved(sectors, "read") == (read + 1) * ELEMENTS, kernel
        assert moved(sectors, "written") == written * ELEMENTS, kernel
