"""Compile every kernel variant ahead of time, without a GPU, and print what came out.

One JSON object per line and variant: the bytes that one thread loads and stores in vector
instructions, registers, stack, conversions between layouts, and atomics. Runs without
TRITON_INTERPRET.

    python tests/backends/aot_compile.py                  every variant for sm_90, a FEW for all
    python tests/backends/aot_compile.py --all            every variant for all targets, fp16 too
    python tests/backends/aot_compile.py --without-hints  a few, with the alignment hints taken out
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsam.space import PARTIALS

# by import_module: as attributes of the package, these names are the launchers
common, norm, climb, step = (importlib.import_module(f"fastsam.kernels.triton.{name}")
                             for name in ("common", "norm", "climb", "step"))

KERNELS = {"dots": norm.dots_kernel, "norm": norm.norm_kernel, "climb": climb.climb_kernel,
           "step": step.step_kernel}
# (MODE, SCALING): every mode of SAM and Friendly-SAM with ASAM's T too, and FisherSAM
ASCENTS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (4, 0)]
# (MIX, PERTURBED): none, GSAM, LookSAM's k-th steps and those between
MIXES = [(0, False), (0, True), (1, True), (2, True), (3, False)]
# (BASE, MIX, PERTURBED, ALONG_V): those over every base, and Momentum-SAM's
STEPS = [*((base, *mix, False) for base, mix in product((0, 1, 2), MIXES)),
         (1, 0, True, True), (2, 0, True, True)]
CONSTANTS = {
    "dots": [dict(MODE=mode) for mode in (1, 2, -1)],
    "norm": [dict(MODE=mode, SCALING=scaling, MASTERS=masters)
             for (mode, scaling), masters in product(ASCENTS, (False, True))
             if scaling == 1 or not masters],  # else it reads no weights
    "climb": [dict(MODE=mode, SCALING=scaling, MASTERS=masters)
              for (mode, scaling), masters in product([*ASCENTS, (-1, 0), (-1, 1)],
                                                      (False, True))],
    "step": [dict(BASE=base, MIX=mix, PERTURBED=perturbed, ALONG_V=along_v, MASTERS=masters)
             for (base, mix, perturbed, along_v), masters in product(STEPS, (False, True))],
}
FEW = {  # SAM, FisherSAM, Momentum-SAM, LookSAM's k-th step, Friendly-SAM in both conventions; SGD
    # with momentum, Adam
    "dots": [dict(MODE=1)],
    "norm": [dict(MODE=mode, SCALING=0, MASTERS=False) for mode in (0, 1)],
    "climb": [dict(MODE=mode, SCALING=scaling, MASTERS=False)
              for mode, scaling in ((0, 0), (0, 2), (1, 0), (2, 1))],
    "step": [dict(BASE=1, MIX=2, PERTURBED=True, ALONG_V=False, MASTERS=False),
             *(dict(BASE=base, MIX=0, PERTURBED=True, ALONG_V=along_v, MASTERS=masters)
               for along_v, (base, masters) in product((False, True), (
                   (1, False), (2, True), (2, False))))],
}
TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MIXED = ("bf16/fp32", "fp32/bf16")  # weights and gradients
INTEGERS = {"blocks": "*i32", "counters": "*i32", "m_steps": "*i32", "v_steps": "*i32",
            "layout": "*i64", "guard": "fp32", "noise_share": "fp32"}


def block_of(name: str, constants: dict, elements: str) -> int:
    """As the launchers choose it."""
    mode, scaling, masters = (constants.get(c) for c in ("MODE", "SCALING", "MASTERS"))
    if name == "norm":
        return norm.block_of(mode, scaling, "fp32" not in elements and not masters)
    if name == "climb":
        return climb.block_of(mode, scaling, DTYPES[elements.split("/")[0]], masters)
    if name == "step":
        return step.block_of(constants["MIX"], masters)
    return common.BLOCK


def plain(name: str) -> list[dict]:
    """The variants of a kernel without masters."""
    return [c for c in CONSTANTS[name] if not c.get("MASTERS")]


def signature(kernel, element: str, constants: dict) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INTEGERS:
            types[name] = INTEGERS[name]
        elif name.endswith("_table"):
            types[name] = "*i64"
        elif name.startswith("n_"):
            types[name] = "i32"
        else:
            narrow = name == "saved" and not constants.get("MASTERS")
            types[name] = f"*{element}" if narrow else "*fp32"
    return types


def compile_variant(name: str, constants: dict, elements: str, target: str):
    """The compiled kernel, every pointer argument 16-byte aligned as torch allocates it."""
    kernel, (element, *others) = KERNELS[name], elements.split("/")
    constants = {**constants, "TYPE": TYPES[element], "G_TYPE": TYPES[(others or [element])[0]],
                 "BLOCK": block_of(name, constants, elements)}
    if "PARTIALS" in kernel.arg_names:
        constants["PARTIALS"] = PARTIALS
    types = signature(kernel, element, constants)
    index = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    aligned = {index[p.name]: [["tt.divisibility", 16]] for p in kernel.params
               if types[p.name][0] == "*" and not p.do_not_specialize_on_alignment}
    source = ASTSource(kernel, types, {index[k]: x for k, x in constants.items()}, aligned)
    target = TARGETS[target]
    options = options_for(target.backend, common.options(target.arch))
    return triton.compile(source, target=target, options=options)


def options_for(backend: str, options: dict) -> dict:
    """The launch options as they are there: only NVIDIA's compiler takes maxnreg."""
    return {k: x for k, x in options.items() if k != "maxnreg" or backend == "cuda"}


def nvidia(compiled) -> dict:
    ptx = compiled.asm["ptx"]
    moved = {"ld": 0, "st": 0}
    for way, count, bits in re.findall(
            r"\b(ld|st)\.global\S*?\.v(\d)\.[buf](\d+)\b", ptx):
        moved[way] += int(count) * int(bits) // 8
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True,
                               check=True).stdout
    registers, stack, local = map(int, re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    return dict(load_bytes=moved["ld"], store_bytes=moved["st"], registers=registers,
                stack=stack + local,
                atomics=re.findall(r"\b(?:atom|red)\.\S+", ptx))


def amd(compiled) -> dict:
    asm = compiled.asm["amdgcn"]
    # buffer_ only: the scalar reads of the tables are global_load_dwordx2 as well
    moved = {"load": 0, "store": 0}
    for way, words in re.findall(r"\bbuffer_(load|store)_dwordx(\d)", asm):
        moved[way] += 4 * int(words)
    # not sgpr_spill_count: scalars spill into lanes of vector registers, not to memory
    keys = ("private_segment_fixed_size", "vgpr_spill_count")
    return dict(load_bytes=moved["load"], store_bytes=moved["store"],
                registers=int(re.search(r"\.vgpr_count:\s+(\d+)", asm)[1]),
                stack=sum(int(re.search(rf"\.{key}:\s+(\d+)", asm)[1]) for key in keys),
                atomics=re.findall(r"\b\w+_atomic_\w+", asm))


def row(job: tuple) -> dict:
    name, constants, elements, target = job
    compiled = compile_variant(name, constants, elements, target)
    measure = amd if target.startswith("gfx") else nvidia
    threads = TARGETS[target].warp_size * common.WARPS
    return dict(kernel=name, constants=constants, type=elements, target=target,
                elements=block_of(name, constants, elements) // threads,
                partials=PARTIALS // threads, programs=common.PROGRAMS, threads=threads,
                shared=compiled.metadata.shared,
                conversions=compiled.asm["ttgir"].count("convert_layout"), **measure(compiled))


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    if "--without-hints" in sys.argv:
        for module in (norm, climb, step):
            module.wide_pointer = common.pointer
        jobs = [(name, plain(name)[-1], "fp32", "sm_90") for name in CONSTANTS]
        rows = map(row, jobs)
    else:
        everything = "--all" in sys.argv
        elements = ("fp32", "bf16", "fp16")[:3 if everything else 2]
        jobs = [(name, constants, element, target) for target in TARGETS for name in CONSTANTS
                for constants in (CONSTANTS if everything or target == "sm_90" else FEW)[name]
                for element in elements if element != "fp32" or not constants.get("MASTERS")]
        jobs += [(name, plain(name)[i], elements, "sm_90") for name in CONSTANTS for i in (0, -1)
                 for elements in MIXED]
        rows = ProcessPoolExecutor(2).map(row, jobs, chunksize=4)
    for result in rows:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
