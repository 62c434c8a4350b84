"""The devices that this machine and this torch have."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

BF16 = ("avx512_bf16", "amx_bf16")  # torch.cpu.get_capabilities' names


def usable_device(name: str) -> torch.device:
    """Return the device, or raise ValueError when this machine or this torch does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        first_line = str(e).strip().splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used here ({first_line}); try --device cpu"
        ) from e
    return device


def warn_of_slow_bf16(device: torch.device, way_out: str) -> None:
    """Warn where each product in bf16 is made from conversions: on an x86 processor that is known
    to have no instructions for it. way_out: the option that asks for float32."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type != "cpu" or known.get("architecture") != "x86_64":
        return
    if not any(known.get(name) for name in BF16):
        warnings.warn(
            "this processor has no bf16 instructions: bf16 is slower here than float32, which is "
            f"{way_out}",
            stacklevel=2,
        )
