"""From a backend's name to the module that does the arithmetic."""

from types import ModuleType

import torch

from . import reference

BACKENDS = ("triton", "reference")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def resolve(backend: str | None, kinds: list[tuple[torch.device, torch.dtype, bool]],
            ) -> tuple[ModuleType, dict[str, str]]:
    """The module to run, and a report of what was chosen and why.

    Args:
        backend: None chooses ("triton" on a GPU that can, else "reference"); a name is obeyed.
        kinds: (device, dtype, dense) of every space of the optimizer.

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of "
                         f"{', '.join(map(repr, BACKENDS))}, or None to choose")
    obstacle = next(filter(None, (why_not_triton(*kind) for kind in kinds)), None)
    if backend == "triton" and obstacle:
        raise ValueError(f"backend='triton' cannot run: {obstacle}; "
                         "use backend='reference' or None")
    on_gpu = all(device.type == "cuda" for device, _, _ in kinds)
    if backend == "triton" or (backend is None and on_gpu and not obstacle):
        from fastsam import kernels
        why = "asked for" if backend else "the parameters are on a GPU"
        return kernels, {"backend": "triton", "why": why}
    why = "asked for" if backend else obstacle or "the parameters are not on a GPU"
    return reference, {"backend": "reference", "why": why}
