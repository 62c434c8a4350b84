"""How long the kernels should take on a GPU that is not here: `python -m bench gpu --predict`.

A model to be proved wrong, of what the compiler made: registers and shared memory say how many
programs run at once, the machine code says which loads wait for which and how many bytes a program
asks for before it waits. A kernel takes

    launch + prologue chain + max(bytes / bandwidth, blocks x time of one + later slots' chains)

where a block takes one latency of memory and its instructions. The GPUs' multiprocessors and peak
bandwidths are their makers'; what a copy reaches of that, latencies and clocks under load are
assumptions, round numbers, and no measurement of ours.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench.files import append_jsonl
from bench.provenance import git_hash, stamp
from bench.reports.tables import markdown
from bench.speed.contenders import kernel_bytes

SIZES = {"preactresnet18": 11_172_170, "wrn28-10": 36_479_194, "100m": 10**8, "1b": 10**9}
TENSORS = 62
METHODS = {"sam": (0, 0), "asam": (0, 1), "fsam": (1, 0)}  # (MODE, SCALING)
BASES = {"sgd": 1, "adamw": 2}  # BASE
DTYPES = {"fp32": 4, "bf16": 2}
LAUNCH = 2e-6  # seconds from the end of one kernel of a graph to the begin of the next
REGISTERS, SLICE = 65536, 256  # of a multiprocessor, given to warps in slices


@dataclass(frozen=True)
class Gpu:
    """peak: bytes per second. copy: the part of it that a copy reaches. memory, cache: seconds
    that a load takes, from memory under load and from L2. clock: Hz. threads, shared: of a
    multiprocessor, shared in bytes."""

    name: str
    target: str
    multiprocessors: int
    peak: float
    memory: float
    cache: float
    clock: float
    copy: float = 0.92
    threads: int = 2048
    shared: int = 228 * 1024


# Multiprocessors and peak bandwidths, as published:
# A100, of 80 GB, SXM: images.nvidia.com/aem-dam/en-zz/Solutions/data-center/
#   nvidia-ampere-architecture-whitepaper.pdf; glennklockwood.com/garden/processors/A100
# H100, SXM (a PCIe card has 114 and 2.0 TB/s):
#   archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html;
#   docs.nvidia.com/launchpad/ai/h100-mig/latest/h100-mig-gpu.html
# H200: openmetal.io/resources/blog/how-the-h200-is-built-for-memory-bound-ai-workloads, with the
#   H100 SXM's chip
# B200: chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut (148);
#   docs.vultr.com/inference-cookbook/cuda/getting-started/hardware-overview (8.0 TB/s)
# RTX 4090: thefpsreview.com/gpu-family/nvidia-geforce-rtx-4090-gpu-family-specifications
# Threads and shared memory of a multiprocessor: CUDA C++ Programming Guide, technical
# specifications per compute capability.
GPUS = {
    "A100": Gpu("A100", "sm_80", 108, 2.039e12, 550e-9, 250e-9, 1.4e9, shared=164 * 1024),
    "H100": Gpu("H100", "sm_90", 132, 3.35e12, 600e-9, 270e-9, 1.7e9),
    "H200": Gpu("H200", "sm_90", 132, 4.8e12, 600e-9, 270e-9, 1.7e9),
    "B200": Gpu("B200", "sm_100", 148, 8.0e12, 750e-9, 350e-9, 1.8e9),
    "RTX4090": Gpu("RTX 4090", "sm_89", 128, 1.008e12, 600e-9, 300e-9, 2.4e9, threads=1536,
                   shared=100 * 1024),
}  # fmt: skip


class Code(NamedTuple):
    """What is read off a compiled kernel. block: elements. loaded, in_flight: bytes that a thread
    asks for in a block, and before it first waits. instructions: of a warp and block. chain,
    slot_chain: loads that wait for one another before the first of a block's, from the kernel's
    and from a slot's begin."""

    programs: int
    threads: int
    block: int
    registers: int
    shared: int
    loaded: int
    in_flight: int
    instructions: int
    chain: int
    slot_chain: int


# ---- the machine code


class Instruction(NamedTuple):
    address: int
    predicate: str | None
    opcode: str
    operands: list[str]

    @property
    def bytes(self) -> int:
        """What a global load brings each thread."""
        width = re.search(r"\.(64|128|256)\b", self.opcode)
        narrow = 2 if ".U16" in self.opcode else 4
        return int(width[1]) // 8 if width else narrow

    @property
    def is_load(self) -> bool:
        return self.opcode.startswith("LDG")


def disassemble(text: str) -> list[Instruction]:
    """What cuobjdump -sass prints."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+) )?([A-Z][\w.]*)([^;]*);", text)
    return [Instruction(int(address, 16), predicate.lstrip("!") or None, opcode,
                        [o.strip() for o in operands.split(",") if o.strip()])
            for address, predicate, opcode, operands in found]


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """(begin, end) of every loop, as places in the code: from a jump back to where it jumps."""
    place = {i.address: n for n, i in enumerate(code)}
    found = []
    for n, i in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", i.operands[-1]) if i.opcode.startswith("BRA") else None
        if target and place.get(int(target[1], 16), n) < n:
            found.append((place[int(target[1], 16)], n))
    return found


def wide_bytes(code: list[Instruction]) -> int:
    return sum(i.bytes for i in code if i.is_load and i.bytes >= 8)


def registers(operand: str) -> list[str]:
    return re.findall(r"\bU?[RP]\d+", operand)


def written(i: Instruction) -> list[str]:
    """Registers and predicates that an instruction writes: its first operand, more of a load's."""
    if not i.operands or i.opcode.startswith(("ST", "BRA", "BAR", "EXIT")):
        return []
    own = registers(i.operands[0])
    if own and (i.is_load or ".WIDE" in i.opcode or ".64" in i.opcode):
        kind, first = re.findall(r"(\D+)(\d+)", own[0])[0]
        own = [f"{kind}{int(first) + k}" for k in range(max(1 if i.is_load else 2, i.bytes // 4))]
    if i.opcode.startswith(("ISETP", "FSETP", "PLOP", "UISETP", "LOP3", "IADD3")):
        own += registers(i.operands[1]) if "P" in i.operands[1] else []
    return own


def first_wide_depth(code: list[Instruction], begin: int, end: int) -> int:
    """Loads that wait for one another before the first wide load in [begin, end), of those from
    `begin` on: along registers, and through jumps and barriers, in the order of the text."""
    depth: dict[str, int] = {}
    control = 0
    for i in code[begin:end]:
        reads = [r for o in i.operands[1:] for r in registers(o)]
        reads += [i.predicate] if i.predicate else []
        if i.opcode.startswith(("ST", "BRA")):
            reads += [r for r in registers(i.operands[0])]
        now = max([control, *(depth.get(r, 0) for r in reads)])
        if i.opcode.startswith("BRA"):
            control = now
        elif i.opcode.startswith("BAR"):
            control = max([control, *depth.values()])
        for r in written(i):
            depth[r] = now + i.is_load
    return max([control, now])


def before_waiting(body: list[Instruction]) -> int:
    """Bytes that a thread of a loop's body asks for before an instruction needs any of them."""
    asked = 0
    coming: set[str] = set()
    for i in body:
        reads = {r for o in (i.operands if i.opcode.startswith("ST") else i.operands[1:])
                 for r in registers(o)}
        if reads & coming:
            return asked
        if i.is_load:
            asked += i.bytes
            coming |= set(written(i))
    return asked


def fast_loop(code: list[Instruction]) -> tuple[int, int]:
    """The innermost loop over blocks whose elements are had in fours: within that over slots."""
    found = loops(code)

    def within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
        return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]

    inner = [x for x in found if any(within(x, y) for y in found)
             and not any(within(y, x) for y in found)]
    return max(inner, key=lambda x: wide_bytes(code[x[0]:x[1]]))


def read_code(compiled: Any, block: int, threads: int, programs: int) -> Code:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", "-sass", cubin], capture_output=True, text=True,
                              check=True).stdout
    code = disassemble(text)
    begin, end = fast_loop(code)
    around = [(a, b) for a, b in loops(code) if a <= begin and end <= b and (a, b) != (begin, end)]
    outer = min(around, key=lambda loop: loop[1] - loop[0], default=(begin, end))
    first = next(n for n in range(begin, end) if code[n].is_load and code[n].bytes >= 8)
    return Code(programs, threads, block, int(re.findall(r"REG:(\d+)", text)[0]),
                compiled.metadata.shared, sum(i.bytes for i in code[begin:end] if i.is_load),
                before_waiting(code[begin:end]), end - begin + 1,
                first_wide_depth(code, 0, first + 1),
                first_wide_depth(code, outer[0], first + 1))


@cache
def compiled_code(kernel: str, constants: tuple, dtype: str, target: str) -> Code:
    """Raises ValueError where Triton is missing, or told to interpret."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 leaves nothing to compile; unset it to predict")
    try:
        from tests.backends import aot_compile as aot
    except ImportError as error:
        raise ValueError(f"the prediction needs Triton and a checkout ({error})") from error
    of = dict(constants)
    compiled = aot.compile_variant(kernel, of, dtype, target)
    return read_code(compiled, aot.block_of(kernel, of, dtype), 32 * aot.common.WARPS,
                     aot.common.PROGRAMS)


# ---- the model


def resident(code: Code, gpu: Gpu) -> int:
    """Programs that run at once on a multiprocessor."""
    warps = REGISTERS // (-(-32 * code.registers // SLICE) * SLICE)
    return min(32 * warps // code.threads, gpu.threads // code.threads,
               gpu.shared // (code.shared + 1024))


def predicted(code: Code, gpu: Gpu, parameters: int, bytes_each: int) -> dict[str, Any]:
    """A kernel's seconds and what they follow from. bytes_each: per parameter, both ways."""
    blocks = -(-parameters // code.block)
    programs = min(code.programs, blocks)
    at_once = min(programs, resident(code, gpu) * gpu.multiprocessors)
    waves = -(-programs // at_once)
    on_one = at_once / gpu.multiprocessors
    # a warp alone issues an instruction every other cycle; a multiprocessor four of all its warps
    one = max(gpu.memory * code.loaded / code.in_flight + 2 * code.instructions / gpu.clock,
              on_one * code.instructions / gpu.clock)
    floor = parameters * bytes_each / (gpu.copy * gpu.peak)
    waiting = waves * (blocks / programs * one + TENSORS / programs * code.slot_chain * gpu.cache)
    seconds = LAUNCH + waves * code.chain * gpu.cache + max(floor, waiting)
    return dict(seconds=seconds, floor=floor, waves=waves, programs_at_once=at_once,
                in_flight=round(on_one * code.threads * code.in_flight),
                needed=round(gpu.copy * gpu.peak * gpu.memory / gpu.multiprocessors))


def launches(method: str, base: str, dtype: str) -> list[tuple[str, dict, int]]:
    """A step's kernels: the name, its constants, and its bytes per parameter."""
    mode, scaling = METHODS[method]
    constants = dict(norm=dict(MODE=mode, SCALING=scaling, MASTERS=False),
                     climb=dict(MODE=mode, SCALING=scaling, MASTERS=False),
                     step=dict(BASE=BASES[base], MIX=0, PERTURBED=True, ALONG_V=False,
                               MASTERS=False))
    return [(kernel, constants[kernel], n)
            for kernel, n in kernel_bytes(method, base, DTYPES[dtype]).items()]


def prediction(gpu: Gpu, method: str, base: str, dtype: str, size: str) -> dict[str, Any]:
    """A row: microseconds and share of the bandwidth floor of a step, replayed as a graph, and of
    its kernels."""
    kernels = {}
    for kernel, constants, n in launches(method, base, dtype):
        code = compiled_code(kernel, tuple(constants.items()), dtype, gpu.target)
        found = predicted(code, gpu, SIZES[size], n)
        seconds, floor = found.pop("seconds"), found.pop("floor")
        kernels[kernel] = dict(us=1e6 * seconds, of_floor=floor / seconds, bytes_each=n, **found,
                               code=code._asdict())
    us = sum(k["us"] for k in kernels.values())
    floor = sum(k["us"] * k["of_floor"] for k in kernels.values())
    return dict(kind="prediction", gpu=gpu.name, method=method, base=base, dtype=dtype,
                workload=size, parameters=SIZES[size], us=us, of_floor=floor / us,
                kernels=kernels, assumed=asdict(gpu) | {"launch": LAUNCH, "tensors": TENSORS})


def predictions(gpu: Gpu) -> list[dict[str, Any]]:
    return [prediction(gpu, *what) for what in product(METHODS, BASES, DTYPES, SIZES)]


def cell(part: dict[str, Any]) -> str:
    return f"{part['us']:.0f} us, {part['of_floor']:.0%}"


def prediction_table(rows: list[dict[str, Any]]) -> str:
    """Time and share of the floor of each kernel and step."""
    head = ["GPU", "method", "over", "type", "parameters", "norm", "climb", "step", "all"]
    lines = [[r["gpu"], r["method"], r["base"], r["dtype"], f"{r['parameters'] / 1e6:.1f} M",
              *(cell(r["kernels"][k]) for k in ("norm", "climb", "step")), cell(r)] for r in rows]
    return markdown(head, lines, left=4)


def assumptions(gpu: Gpu) -> str:
    return (f"A prediction, not a measurement. Assumed of the {gpu.name}: "
            f"{gpu.multiprocessors} multiprocessors, {gpu.peak / 1e12:.3g} TB/s of which a copy "
            f"reaches {gpu.copy:.0%} (the floor), {gpu.memory * 1e9:.0f} ns from memory and "
            f"{gpu.cache * 1e9:.0f} ns from L2 under load, {gpu.clock / 1e9:.3g} GHz, "
            f"{LAUNCH * 1e6:.0f} us between the kernels of a graph, {TENSORS} equal tensors; every "
            "load is from memory, none of another kernel's bytes are found in L2.")


def predict(names: list[str], rows_path: Path | None = None) -> int:
    """Print, and append to `rows_path`, what is predicted for these GPUS. Raises ValueError for an
    unknown one."""
    for name in names:
        if name not in GPUS:
            raise ValueError(f"unknown GPU {name!r}; choose of {', '.join(GPUS)}")
    git = git_hash()
    for gpu in (GPUS[name] for name in names):
        rows = predictions(gpu)
        if rows_path is not None:
            rows_path.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(rows_path, [r | stamp("cpu", git) for r in rows])
        print(f"{assumptions(gpu)}\n\n{prediction_table(rows)}\n", flush=True)
    return 0


def beside_measured(measured: list[dict[str, Any]], device: str) -> str:
    """What `bench step` measured in a graph beside what was predicted for this device; empty where
    there is neither."""
    gpu = next((g for g in GPUS.values() if g.name.replace("RTX ", "") in device), None)
    sizes = {n: name for name, n in SIZES.items()}
    lines = []
    for r in measured:
        if (gpu is None or not r.get("graph") or r["implementation"] != "fastsam triton"
                or r["method"] not in METHODS or r["parameters"] not in sizes):
            continue
        own = prediction(gpu, r["method"], r["base"], r["dtype"], sizes[r["parameters"]])
        us, of_floor = 1e3 * r["ms"]["p50"], r["of_copy"]
        lines.append([r["method"], r["base"], r["dtype"], f"{r['parameters'] / 1e6:.1f} M",
                      f"{us:.0f} us, {of_floor:.0%}", cell(own), f"{us / own['us']:.2f}"])
    head = ["method", "over", "type", "parameters", "measured", "predicted", "ratio"]
    return markdown(head, lines, left=3) if lines else ""
