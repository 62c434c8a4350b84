"""What the compiler makes of the kernels, per target: vector width, registers, spills, atomics.

Compiled in a process of its own, because this one may run Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

ROOT = Path(__file__).parents[2]
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# published as bench.speed.predict says; the RTX 5090's at
# pocketmags.com/linux-format-magazine/may-2025/articles/nvidia-geforce-rtx-5090
GPUS = {  # target: the smallest of those named: multiprocessors, threads and KB shared on each
    "sm_80": ("A100", 108, 2048, 164),
    "sm_89": ("RTX 4090", 128, 1536, 100),
    "sm_90": ("H100 PCIe", 114, 2048, 228),
    "sm_100": ("B200", 148, 2048, 228),
    "sm_120": ("RTX 5090", 170, 1536, 100),
}
REGISTERS = 65536  # of a multiprocessor, given to warps in pieces of 256


def compile_rows(*arguments: str) -> list[dict]:
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, Path(__file__).with_name("aot_compile.py"), *arguments],
                          env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return compile_rows()


def budget(row: dict) -> tuple[int, int]:
    """The bytes that a thread must load and store in vector instructions: design's table of
    streams. w and the saved w have the parameters' dtype, g its own; m, v, u, the masters and the
    sums are fp32."""
    c, fp32 = row["constants"], 4 * row["elements"]
    kinds = row["type"].split("/")
    w, g = (ITEM[kind] * row["elements"] for kind in (kinds[0], kinds[-1]))
    if row["target"] == "gfx942" and w == g == 4:  # one word a thread, which is no vector
        w = g = 0
    if row["kernel"] == "dots":
        return g + fp32, 0
    if row["kernel"] == "step":
        states, masters = fp32 * c["BASE"], fp32 * c["MASTERS"]
        old_w = w if not (c["MASTERS"] and c["PERTURBED"]) else 0
        mix = c.get("MIX", 0)
        mixed = fp32 * (0, 1, 1, 1)[mix]  # the kept gradient, for LookSAM's k-th step too; m
        new_m = fp32 * (mix == 2)
        if mix == 2 and row["target"] == "gfx942":  # by global instructions, which are not counted
            mixed = new_m = 0
        return g + old_w + masters + states + mixed, w + masters + states + new_m
    m, masters = fp32 * (c["MODE"] > 0), fp32 * c["MASTERS"]
    if row["kernel"] == "norm":
        return g + m + (w + masters) * (c["SCALING"] == 1), 0
    g *= c["MODE"] != 3 or c["SCALING"] == 2  # the part along a given m needs no g
    sums = 4 * row["partials"] * (1 + (c["MODE"] > 0))
    new_m, saved = fp32 * (c["MODE"] in (1, 2, -1)), w * (not c["MASTERS"])
    return g + m + w + masters + sums, w + saved + new_m


def missed(row: dict) -> list[str]:
    loads, stores = budget(row)
    return [f"{what}: {row[key]} of {expected} bytes in vectors"
            for what, key, expected in (("loads", "load_bytes", loads),
                                        ("stores", "store_bytes", stores))
            if row[key] < expected]


def name(row: dict) -> str:
    constants = ", ".join(f"{k}={x}" for k, x in row["constants"].items())
    return f"{row['kernel']}({constants}) {row['type']} {row['target']}"


def complaints(rows: list[dict], what) -> str:
    return "\n".join(f"{name(row)}: {found}" for row in rows if (found := what(row)))


def check_counts(rows: list[dict], target: str) -> None:
    """Whether all variants are there for each type, with masters for 16-bit ones."""
    counts = Counter((r["kernel"], r["type"]) for r in rows if r["target"] == target)
    for element in {r["type"] for r in rows if "/" not in r["type"]}:
        found = [counts[kernel, element] for kernel in ("dots", "norm", "climb", "step")]
        expected = [3, 9, 11, 17] if element == "fp32" else [3, 12, 22, 34]
        assert found == expected, (target, element)


def test_every_variant_is_compiled_for_sm_90_and_some_for_every_target(rows):
    check_counts(rows, "sm_90")
    for target in TARGETS:
        kinds = {(r["kernel"], r["type"]) for r in rows if r["target"] == target}
        assert kinds >= set(product(("dots", "norm", "climb", "step"), ("fp32", "bf16"))), target
    for elements in ("bf16/fp32", "fp32/bf16"):
        counts = Counter(r["kernel"] for r in rows if r["type"] == elements)
        assert counts == dict(dots=2, norm=2, climb=2, step=2)


@pytest.mark.long
def test_all_variants_for_all_targets():
    rows = compile_rows("--all")
    for target in TARGETS:
        check_counts(rows, target)
    found = complaints(rows, missed) + complaints(rows, lambda r: r["stack"] and "spills")
    nvidia = [r for r in rows if r["target"] in GPUS]
    found += complaints(nvidia, lambda r: r["programs"] > resident(r) and "several waves")
    found += complaints(nvidia, lambda r: r["conversions"] and "conversions")
    assert not found, found


@pytest.mark.parametrize("target", TARGETS)
def test_the_fast_path_moves_every_stream_in_vectors(rows, target):
    found = complaints([r for r in rows if r["target"] == target], missed)
    assert not found, found


def test_the_vector_check_notices_missing_alignment_hints():
    bare = compile_rows("--without-hints")
    assert [r["kernel"] for r in bare] == ["dots", "norm", "climb", "step"]
    assert all(missed(r) for r in bare)


@pytest.mark.parametrize("target", TARGETS)
def test_no_variant_spills_to_local_memory(rows, target):
    """The stack frame tells: on sm_90 cuobjdump's LOCAL stays 0 even with STL and LDL in it."""
    found = complaints([r for r in rows if r["target"] == target],
                       lambda r: r["stack"] and f"{r['stack']} bytes of stack or spills")
    assert not found, found


def resident(row: dict) -> int:
    """How many programs run at once on the smallest GPU of the row's target."""
    _, multiprocessors, threads, kilobytes = GPUS[row["target"]]
    warps = REGISTERS // (-(-32 * row["registers"] // 256) * 256)
    return multiprocessors * min(warps * 32 // row["threads"], threads // row["threads"],
                                 kilobytes * 1024 // (row["shared"] + 1024))


@pytest.mark.parametrize("target", GPUS)
def test_every_launch_is_one_wave(rows, target):
    found = complaints([r for r in rows if r["target"] == target],
                       lambda r: r["programs"] > resident(r) and (
                           f"{r['registers']} registers: {resident(r)} of {r['programs']} programs "
                           f"run at once on {GPUS[target][0]}"))
    assert not found, found


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_registers_are_at_most_80(rows, target):
    """Six programs on a multiprocessor, with what they have on its way, hide its latency."""
    found = complaints([r for r in rows if r["target"] == target],
                       lambda r: r["registers"] > 80 and f"{r['registers']} registers")
    assert not found, found


def test_no_thread_hands_its_elements_to_another(rows):
    """Streams of different vector width would give threads different elements, and a conversion
    through shared memory for every block. (gfx942's warps are of 64 threads, and its sums are
    converted.)"""
    found = complaints([r for r in rows if r["target"] in GPUS],
                       lambda r: r["conversions"] and f"{r['conversions']} conversions")
    assert not found, found


def test_the_only_atomic_is_the_integer_ticket(rows):
    """Float atomics would add in another order every time. On gfx942 the ordering is a matter of
    other instructions (buffer_wbl2, buffer_inv), so there only the count and the type."""
    for row in rows:
        kinds = [set(a.replace("_", ".").split(".")) for a in row["atomics"]]
        assert len(kinds) == (row["kernel"] in ("climb", "step")), name(row)
        for kind in kinds:
            assert "add" in kind, name(row)
            assert not kind & {"f16", "f16x2", "bf16x2", "f32", "f64", "pk"}, name(row)
            assert "acq" in kind and "rel" in kind or row["target"] == "gfx942", name(row)
