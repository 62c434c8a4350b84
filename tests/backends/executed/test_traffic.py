"""The 32-byte sectors that every warp asks for, against the design's bytes per parameter."""

import pytest
import torch

from fastsam import ASAM, SAM, FriendlySAM
from fastsam.kernels import triton as kernels

from .steps import BLOCK, Steps, normals

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


def overhead(sectors) -> int:
    """Bytes of all else: tables, partial sums, counters."""
    return SECTOR * sum(sectors.values()) - moved(sectors, "read") - moved(sectors, "written")


def traffic(executed, **kwargs) -> list:
    steps = Steps(normals(SIZES), **kwargs)
    steps.run(SIZES, steps=1)
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
    steps = Steps(normals(SIZES, torch.bfloat16), momentum=0.9, master_weights=masters)
    steps.run(SIZES, steps=1)
    budget = (((6, 0), (12, 6), (10, 10)) if masters else ((6, 0), (8, 8), (8, 6)))
    for (kernel, sectors), (read, written) in zip(executed.traffic, budget, strict=True):
        assert moved(sectors, "read") == read * ELEMENTS, kernel
        assert moved(sectors, "written") == written * ELEMENTS, kernel


def test_pgd_reads_three_images_and_writes_one(executed):
    x = torch.rand(4, 2 * BLOCK)
    kernels.linf_step(x.clone(), torch.randn_like(x), x, 0.1, 0.05)
    (_, sectors), = executed.traffic
    assert SECTOR * sectors["x_adv", "written"] == 4 * x.numel()
    for name in ("x_adv", "g", "x"):
        assert SECTOR * sectors[name, "read"] == 4 * x.numel()


def test_a_misaligned_gradient_costs_four_times_its_reading(executed):
    """Each thread's four elements are asked for one by one: this is what the first-level cache,
    not the memory, has to serve. The count would show if the fast path were lost."""
    steps = Steps(normals(SIZES), momentum=0.9)
    grads = normals(SIZES, seed=1)
    steps.climb(grads, offset=1)
    (_, norm), (_, climb) = executed.traffic
    for sectors in (norm, climb):
        read = SECTOR * sectors["*g_table", "read"]
        assert 4 * 4 * ELEMENTS <= read <= 4 * 4.6 * ELEMENTS
