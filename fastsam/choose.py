"""Which backend does the arithmetic, and why."""

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from subprocess import CalledProcessError
from types import ModuleType
from typing import Any

import torch

from .space import Space

MODULES = {"triton": "fastsam.kernels.triton", "numba": "fastsam.kernels.cpu",
           "reference": "fastsam.reference"}
BACKENDS = tuple(MODULES)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORTH_COMPILING = 2**14  # parameters on a CPU: the first step loads code for half a second
GAPS = "a parameter's elements do not fill one stretch of memory, or have the negative bit"

is_forked = False  # from another process, since this was imported


def note_fork() -> None:
    global is_forked
    is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=note_fork)


def why_not_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the Triton kernels cannot serve tensors of this device and dtype; None when they can."""
    try:
        from fastsam.kernels.triton import INTERPRETED, takes
    except Exception as error:  # a Triton that does not fit its torch raises what it likes
        return f"Triton cannot be imported ({first_line(error)})"
    if not takes(device):
        return f"parameters are on {device.type!r}: Triton needs a GPU (or TRITON_INTERPRET=1)"
    if dtype not in TRITON_DTYPES:
        return f"parameters are {dtype}: Triton takes float32, bfloat16 and float16"
    if INTERPRETED and device.type != "cpu":
        return (f"TRITON_INTERPRET=1 reads memory on the host, where none is of {device.type!r}: "
                "unset it")
    return None if INTERPRETED else trial(device)


@cache
def trial(device: torch.device) -> str | None:
    """How Triton fails on this GPU, if it does: tried with a small kernel, once a process."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else str(device)
    if cuda and not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 0):
        return f"{name} has a compute capability below 7.0"
    from fastsam.kernels.triton import linf_step

    try:
        x = torch.zeros(1, device=device)
        linf_step(x.clone(), x, x, 0.0, 0.0)
        if cuda:
            torch.cuda.synchronize(device)
    except Exception as error:
        return f"Triton fails on {name} ({first_line(error)}){remedy(error)}"
    return None


def remedy(error: Exception) -> str:
    """What helps where Triton could not compile what it talks to the driver by."""
    if not (isinstance(error, CalledProcessError) or "C compiler" in str(error)):
        return ""
    return ("; it needs a C compiler, Python's headers and the driver's libcuda, such as gcc and "
            "python3-dev have them")


def why_not_numba(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CPU kernels cannot serve tensors of this device and dtype; None when they can."""
    if device.type != "cpu":
        return f"parameters are on {device.type!r}: numba's kernels run on a CPU"
    try:
        cpu = import_module(MODULES["numba"])
    except Exception as error:  # a numba that does not fit its NumPy raises what it likes
        return f"numba cannot be imported ({first_line(error)}): pip install 'fastsam[cpu]'"
    if import_module("numba").config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT leaves nothing compiled: unset it"
    if dtype not in cpu.DTYPES:
        return f"parameters are {dtype}: numba's kernels take " + ", ".join(map(str, cpu.DTYPES))
    return None


def first_line(error: Exception) -> str:
    """An error in one line: its class, and how its message begins."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def obstacle(backend: str, spaces: Sequence[Space]) -> str | None:
    """Why a backend cannot serve these spaces; None when it can."""
    if backend == "reference":
        return None
    why_not = {"triton": why_not_triton, "numba": why_not_numba}[backend]
    for space in spaces:
        reason = why_not(space.kind.device, space.kind.dtype)
        if reason or not space.dense:
            return reason or GAPS
    return None


def choose(backend: str | None, spaces: Sequence[Space]) -> tuple[ModuleType, dict[str, Any]]:
    """The module to run, and a report of what was chosen and why.

    Args:
        backend: None chooses: "triton" on a GPU that can; "numba" on a CPU, from WORTH_COMPILING
            parameters on; else "reference". A name is obeyed.
        spaces: what is to be served.

    Raises:
        ValueError: an unknown name, or one that cannot run.
    """
    if backend is None:
        backend, why = choice(spaces)
    elif backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of "
                         f"{', '.join(map(repr, BACKENDS))}, or None to choose")
    else:
        why = "asked for"
        reason = obstacle(backend, spaces)
        if reason:
            raise ValueError(f"backend={backend!r} cannot run: {reason}; "
                             "use backend='reference' or None")
    return import_module(MODULES[backend]), {"backend": backend, "why": why}


def choice(spaces: Sequence[Space]) -> tuple[str, str]:
    """The backend that suits, and why."""
    devices, size = {s.kind.device.type for s in spaces}, sum(s.numel for s in spaces)
    if devices == {"cpu"}:
        if size < WORTH_COMPILING:
            return "reference", (f"loading compiled code does not pay for {size} parameters on a "
                                 f"CPU (from {WORTH_COMPILING} on it does); backend='numba' has "
                                 "it anyway")
        reason = obstacle("numba", spaces)
        return ("reference", reason) if reason else ("numba", "the parameters are on a CPU")
    reason = obstacle("triton", spaces)
    return ("reference", reason) if reason else ("triton", "the parameters are on a GPU")
