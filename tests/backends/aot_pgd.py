"""Compile PGD's kernels ahead of time, without a GPU, and print what came out.

One JSON object per line: as aot_compile.py's, and how many addresses are formed in 64 bits
(NVIDIA: and how many multiply-adds are fused). The forms of a launch are Triton's own: "aligned",
"odd" (a length that 16 does not divide), "one" (the length 1 is a constant), "huge" (2^31 or more)
and "misaligned" (nothing is known of the tensors' addresses). Runs without TRITON_INTERPRET.
"""

import importlib
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor

import triton
from aot_compile import TARGETS, TYPES, amd, nvidia, options_for
from triton.compiler import ASTSource

pgd = importlib.import_module("fastsam.kernels.triton.pgd")
LAUNCHES = {  # kernel, block, options
    "linf": (pgd.linf_kernel, pgd.BLOCK, pgd.OPTIONS),
    "l2": (pgd.l2_kernel, pgd.SAMPLE_BLOCK, pgd.SAMPLE_OPTIONS),
}
FORMS = ("aligned", "odd", "one", "huge", "misaligned")
JOBS = ([(name, "aligned", element, target)
         for name in LAUNCHES for target in TARGETS for element in TYPES]
        + [(name, form, "fp32", "sm_90") for name in LAUNCHES for form in FORMS[1:]])


def compile_form(name: str, form: str, element: str, target: str):
    """The compiled kernel, its arguments typed and specialized as for a launch of this form."""
    kernel, block, options = LAUNCHES[name]
    types = {argument: f"*{element}" for argument in ("x_adv", "g", "x")}
    types |= {"eps": "fp32", "alpha": "fp32", "length": "i64" if form == "huge" else "i32"}
    types |= {p.name: "constexpr" for p in kernel.params if p.is_constexpr}
    constants = {"BLOCK": block}
    if form == "one":
        types["length"], constants["length"] = "constexpr", 1
    aligned = [] if form == "misaligned" else ["x_adv", "g", "x"]
    aligned += ["length"] if form in ("aligned", "huge", "misaligned") else []
    index = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, types, {index[k]: x for k, x in constants.items()},
                       {index[k]: [["tt.divisibility", 16]] for k in aligned})
    return triton.compile(source, target=TARGETS[target],
                          options=options_for(TARGETS[target].backend, options))


def row(job: tuple[str, str, str, str]) -> dict:
    name, form, element, target = job
    _, block, options = LAUNCHES[name]
    compiled = compile_form(*job)
    found = amd(compiled) if target.startswith("gfx") else nvidia(compiled)
    if "ptx" in compiled.asm:
        found["fused"] = compiled.asm["ptx"].count("fma.")
    wide = len(re.findall(r"tt\.addptr .*: !tt\.ptr<\w+>, i64", compiled.asm["ttir"]))
    return dict(kernel=name, form=form, type=element, target=target, wide_addresses=wide,
                elements=block // (TARGETS[target].warp_size * options["num_warps"]), **found)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    for result in ProcessPoolExecutor(2).map(row, JOBS, chunksize=4):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
