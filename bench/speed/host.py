"""How long a step keeps the host, measured without a GPU.

Everything runs that runs before a GPU: fastsam, torch's optimizer, Triton's binding of arguments
and its launcher, over a driver library that is pretended and returns at once. The tensors have one
element each and lie on the CPU, where torch's own kernels really run, about a microsecond each;
that is in the times of the optimizers that call them, and not in fastsam's.
"""

import ctypes
import gc
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.files import append_jsonl
from bench.provenance import git_hash, stamp
from bench.speed.contenders import Contender, of_peers, of_torch
from bench.speed.step import BASE_HYPER, PERTURBATION
from bench.speed.timing import Runner, random_like, spread
from fastsam import SAM, FriendlySAM, choose

HYPER = PERTURBATION | BASE_HYPER["sgd"]
TURN = 10  # steps in a row: the second finds its own code in the caches, as everyone's does
# What Triton calls of the NVIDIA driver. A call is right (0); what is asked for is 1, but for the
# numbers that Triton compares its needs with.
LIBCUDA = """
int cuDeviceGetAttribute(int *x, int what, int device) { *x = 232448; return 0; }
int cuFuncGetAttribute(int *x, int what, void *f) { *x = what == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void **x, int what, void *p) { *x = p; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
#define ONE(name) int name(void **x) { *x = (void *)1; return 0; }
ONE(cuCtxGetCurrent) ONE(cuDevicePrimaryCtxRetain) ONE(cuModuleLoadData) ONE(cuModuleGetFunction)
#define NONE(name) int name() { return 0; }
NONE(cuInit) NONE(cuDeviceGet) NONE(cuCtxSetCurrent) NONE(cuFuncSetAttribute) NONE(cuCtxGetDevice)
NONE(cuFuncSetCacheConfig) NONE(cuModuleUnload) NONE(cuDriverGetVersion) NONE(cuCtxGetLimit)
NONE(cuCtxSetLimit) NONE(cuTensorMapEncodeTiled) NONE(cuTensorMapEncodeIm2col)
NONE(cuOccupancyMaxActiveClusters)
int launches = 0;
int cuLaunchKernelEx() { launches++; return 0; }
"""


@dataclass(frozen=True)
class HostConfig:
    """What `python -m bench step --host` measures.

    tensors: numbers of parameters, of one element each. reps: timed steps of each optimizer; None:
    500, or as many as 20 seconds take for each number of parameters, at least 20.

    Raises ValueError for a number below 1.
    """

    tensors: tuple[int, ...] = (10, 62, 161, 1000)
    reps: int | None = None

    def __post_init__(self) -> None:
        for n in (*self.tensors, 1 if self.reps is None else self.reps):
            if n < 1:
                raise ValueError(f"tensors and reps must be at least 1, got {n}")


@contextmanager
def pretended_gpu() -> Iterator[ctypes.c_int]:
    """Let Triton launch on a GPU that is not there, and fastsam take tensors on the CPU for its.
    Yields the number of launches so far.

    Raises ValueError where Triton, or a C compiler, is missing, or a GPU is there.
    """
    if torch.cuda.device_count():  # torch remembers the 0, and asks no driver again
        raise ValueError("--host measures without a GPU; hide it with CUDA_VISIBLE_DEVICES=''")
    try:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia import driver
        from triton.runtime import driver as active
    except ImportError as error:
        raise ValueError(f"--host needs Triton ({error})") from error

    class Driver(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ"):
        library = Path(folder, "libcuda.so.1")
        command = ["cc", "-O2", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-x", "c",
                   "-", "-o", str(library)]
        try:
            subprocess.run(command, input=LIBCUDA, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"--host needs a C compiler ({error})") from error
        loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        active.set_active(Driver())
        with mock.patch.object(choose, "why_not_triton", lambda *_: None):
            yield ctypes.c_int.in_dll(loaded, "launches")


def found() -> list[Contender]:
    """Return whom to time."""
    ours = [
        Contender(method, "fastsam triton", partial(cls, base_optimizer=torch.optim.SGD,
                                                    backend="triton"), 4)
        for method, cls in (("sam", SAM), ("fsam", FriendlySAM))
    ]
    peers, _ = of_peers(("sam", "fsam"), "sgd", 4, False, False)
    return ours + peers + of_torch("sgd", 4, False)


class HostRunner(Runner):
    """A runner whose gradients may lie elsewhere at every other step, as they do in training
    whenever the allocator gives a backward pass other memory than the one before.

    elsewhere: more gradients of both passes; None: they stay where they are.
    """

    def __init__(self, contender: Contender, weights: list[Tensor],
                 passes: tuple[list[Tensor], ...], elsewhere: tuple[list[Tensor], ...] | None,
                 ) -> None:  # fmt: skip
        super().__init__(contender, weights, passes, HYPER)
        calls = [call for _, call in self.phases]
        self.others = list(zip((elsewhere or passes)[-len(calls):], calls, strict=True))

    def microseconds(self) -> float:
        """Return how much of the thread's processor time the calls of one step take; by the clock
        on the wall, others who share the machine would be in it."""
        total = 0
        for grads, call in self.phases:
            self.point_at(grads)
            start = time.thread_time_ns()
            call()
            total += time.thread_time_ns() - start
        self.phases, self.others = self.others, self.phases
        return total / 1e3


def line_up(n: int, move: bool) -> list[HostRunner]:
    """Return a runner per contender over n parameters, after four steps; move: of gradients."""
    cpu = torch.device("cpu")
    weights, *grads = (random_like([1] * n, torch.float32, cpu, seed) for seed in range(5))
    elsewhere = tuple(grads[2:]) if move else None
    runners = [HostRunner(c, weights, tuple(grads[:2]), elsewhere) for c in found()]
    for runner in runners:
        for _ in range(4):
            runner.microseconds()
    return runners


def race(runners: list[HostRunner], reps: int | None) -> list[list[float]]:
    """Return everyone's times in microseconds: in turn, TURN steps at a time."""
    times: list[list[float]] = [[] for _ in runners]
    start = time.monotonic()
    gc.collect()
    for i in range(-(-(reps or 500) // TURN)):
        if reps is None and i >= 2 and time.monotonic() - start > 20:
            break
        for runner, own in zip(runners, times, strict=True):
            own += [runner.microseconds() for _ in range(TURN)]
    return times


def row(runner: HostRunner, us: list[float], launches: int, move: bool) -> dict[str, Any]:
    """Return one contender's numbers; launches: Triton's in a step."""
    return {
        "kind": "host",
        "method": runner.contender.method,
        "implementation": runner.contender.name,
        "base": "sgd",
        "tensors": len(runner.params),
        "gradients": "move" if move else "stay",
        "us": spread(us),
        "reps": len(us),
        "launches": launches,
    }


def measure(config: HostConfig) -> list[dict[str, Any]]:
    """Return a row per contender, number of parameters, and whether their gradients stay."""
    git, rows = git_hash(), []
    with pretended_gpu() as so_far:
        for n, move in product(config.tensors, (False, True)):
            runners, counts = line_up(n, move), []
            for runner in runners:
                before = so_far.value
                runner.microseconds()
                counts.append(so_far.value - before)
            times = race(runners, config.reps)
            rows += [row(*each, move) for each in zip(runners, times, counts, strict=True)]
    shared = {"config": asdict(config), "hyper": HYPER} | stamp("cpu", git)
    return [r | shared for r in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the median times in microseconds, a line per optimizer and kind of gradients."""
    counts = sorted({r["tensors"] for r in rows})
    cells = {(r["method"], r["implementation"], r["gradients"], r["tensors"]): r["us"]["p50"]
             for r in rows}
    lines = [f"{'host time, us; gradients stay or move':<40}" + "".join(f"{n:>9}" for n in counts)]
    for name in dict.fromkeys(key[:3] for key in cells):
        times = "".join(f"{cells[name + (n,)]:9.0f}" for n in counts)
        lines.append(f"{' '.join(name):<40}{times}")
    return "\n".join(lines)


def host(config: HostConfig, rows_path: Path | None = None) -> int:
    """Measure, append the rows to `rows_path`, print a table; return the exit code."""
    rows = measure(config)
    if rows_path is not None:
        append_jsonl(rows_path, rows)
        print(f"wrote {rows_path}")
    print(table(rows))
    return 0
