"""From a backend's name to the module that does the arithmetic."""

import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from . import reference

BACKENDS = ("triton", "compiled", "reference")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORTH_COMPILING = 2**20  # parameters: the first steps cost what a few hundred steps save


class Kind(NamedTuple):
    """What a backend must serve: one space, or the part of one, of an optimizer."""

    device: torch.device
    dtype: torch.dtype
    dense: bool
    size: int


def why_not_triton(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    """Why the Triton kernels cannot serve parameters of this kind; None when they can."""
    try:
        from fastsam import kernels
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device.type != "cuda" and not kernels.INTERPRETED:
        return f"parameters are on {device.type!r}: Triton needs a GPU (or TRITON_INTERPRET=1)"
    if dtype not in TRITON_DTYPES:
        return f"parameters are {dtype}: Triton takes float32, bfloat16 and float16"
    if not dense:
        return "a parameter's elements do not fill one stretch of memory"
    return None


@cache
def why_not_compiled(kind: str) -> str | None:
    """Why torch.compile cannot serve parameters on this kind of device; None when it can. It is
    tried, on a small function, which takes a few seconds once per process."""
    if kind not in ("cpu", "cuda"):
        return f"parameters are on {kind!r}: torch.compile is used on 'cpu' and 'cuda'"
    if not torch._dynamo.is_dynamo_supported() or torch._dynamo.config.disable:
        return "torch.compile is switched off, or does not know this Python"
    return (no_toolchain() if kind == "cpu" else None) or failure(kind)


def no_toolchain() -> str | None:
    """What a CPU's code cannot be built without, where that is missing."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return f"there is no C++ compiler ({first_line(error)}): install g++"
    except Exception as error:
        return f"the C++ compiler does not work ({first_line(error)})"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h is missing: install Python's headers (python3-dev)"
    return None


def failure(kind: str) -> str | None:
    """How torch.compile fails on this kind of device, if it does."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(64, device=kind))
    except Exception as error:
        return f"torch.compile fails on {kind!r} ({first_line(error)})"
    return None


def first_line(error: Exception) -> str:
    """An error in one line: its class, and how its message begins."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def resolve(backend: str | None, kinds: list[Kind]) -> tuple[ModuleType, dict[str, str]]:
    """The module to run, and a report of what was chosen and why.

    Args:
        backend: None chooses: "triton" on a GPU that can; on a CPU "compiled" from WORTH_COMPILING
            parameters on, where there is a C++ compiler; else "reference". A name is obeyed.
        kinds: what the optimizer has.

    Raises:
        ValueError: an unknown name, or one that cannot run.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of "
                         f"{', '.join(map(repr, BACKENDS))}, or None to choose")
    no_triton = next(filter(None, (why_not_triton(*kind[:3]) for kind in kinds)), None)
    if backend is None:
        backend, why = choice(kinds, no_triton)
    else:
        why = "asked for"
    obstacle = no_triton if backend == "triton" else None
    if backend == "compiled":
        obstacle = next(filter(None, (why_not_compiled(k.device.type) for k in kinds)), None)
    if obstacle:
        raise ValueError(f"backend={backend!r} cannot run: {obstacle}; "
                         "use backend='reference' or None")
    return module(backend), {"backend": backend, "why": why}


def choice(kinds: list[Kind], no_triton: str | None) -> tuple[str, str]:
    """The backend that suits, and why."""
    devices, size = {kind.device.type for kind in kinds}, sum(kind.size for kind in kinds)
    if devices == {"cuda"} and not no_triton:
        return "triton", "the parameters are on a GPU"
    if devices != {"cpu"}:
        return "reference", no_triton or "the parameters are not on a GPU"
    if size < WORTH_COMPILING:
        return "reference", (f"compiling does not pay for {size} parameters on a CPU (from "
                             f"{WORTH_COMPILING} on it does); backend='compiled' has it anyway")
    obstacle = why_not_compiled("cpu")
    if obstacle:
        return "reference", f"the parameters are on a CPU, and {obstacle}"
    return "compiled", f"{size} parameters are on a CPU, and there is a C++ compiler"


def module(backend: str) -> ModuleType:
    if backend == "triton":
        from fastsam import kernels
        return kernels
    if backend == "compiled":
        from . import compiled
        return compiled
    return reference
