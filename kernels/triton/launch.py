"""Launching a kernel over a space: what Triton's launcher takes is put together once.

Triton binds, types and compares every argument and global anew at each launch, which takes the
host 20 to 30 us. The arguments of a pass are mostly a space's own buffers, which stay where they
are (where one on a GPU does not, `Layout.has_its_memory` sees to a new space); so a launch like one
before hands the compiled kernel what that one was handed, with the addresses of the tables and sums
that this pass has, and the stream that is current now.

Whatever asks Triton for more than a launch (a hook, debugging, instrumentation), the interpreter,
and versions of Triton that are not known get an ordinary launch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import finalize

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ...passes import Pass
from .common import BLOCK, INTERPRETED, PROGRAMS, TYPES, options

# CompiledKernel.run takes the same in each: it is Triton's own, and may change in the next
CAN_PREPARE = triton.__version__.startswith(("3.5.", "3.6.", "3.7.", "3.8.", "3.9."))


class Launch(NamedTuple):
    """All that a compiled kernel's launcher takes, but for the stream and the addresses that
    move. The kernel is unloaded with `compiled`, which is kept for that alone."""

    compiled: CompiledKernel
    run: Callable[..., None]
    device: int
    programs: int
    function: Any
    metadata: Any
    rest: tuple


PREPARED: dict[tuple, Launch] = {}


def launch(kernel, p: Pass, moving: tuple[Tensor | None, ...], others: Callable[..., dict],
           *numbers: int) -> None:
    """Run a kernel over the space of a pass, on the space's own GPU, whichever is current.

    Args:
        kernel: what to run.
        moving: the kernel's first arguments: what may lie elsewhere at the next pass. How they lie
            must not change the compiled kernel, or be told by one of the numbers.
        others: the kernel's own other arguments by name, from the pass and `numbers`. Which
            launch is like which follows from the space, `p.scaling`, `p.g_dtype` and `numbers`,
            so they may depend on nothing else.
    """
    key = id(kernel), id(p.space), p.scaling, p.g_dtype, *numbers
    ready = PREPARED.get(key)
    if ready is None or not is_plain(kernel):
        launch_ordinarily(kernel, p, moving, others(p, *numbers), key)
        return
    active, (_, run, device, programs, function, metadata, rest) = driver.active, ready
    addresses = [t if t is None else t.data_ptr() for t in moving]
    if active.get_current_device() == device:
        run(programs, 1, 1, active.get_current_stream(device), function, metadata, None, None, None,
            *addresses, *rest)
        return
    with torch.cuda.device(device):
        run(programs, 1, 1, active.get_current_stream(device), function, metadata, None, None, None,
            *addresses, *rest)


def is_plain(kernel) -> bool:
    """Whether a launch is a launch and nothing else."""
    runtime = knobs.runtime
    return not (has_calls(runtime.launch_enter_hook) or has_calls(runtime.launch_exit_hook)
                or runtime.debug or kernel.pre_run_hooks
                or getattr(runtime, "add_stages_inspection_hook", None)
                or getattr(knobs.compilation, "instrumentation_mode", None))


def has_calls(hook: Any) -> bool:
    return bool(hook.calls) if isinstance(hook, knobs.HookChain) else hook is not None


def launch_ordinarily(kernel, p: Pass, moving: tuple[Tensor | None, ...], others: dict,
                      key: tuple) -> None:
    """By Triton's own way; what it handed over is kept for the next launch like this, as long as
    the space is."""
    space, kind = p.space, p.space.kind
    blocks = space.blocks(others.setdefault("BLOCK", BLOCK))
    programs = max(1, min(len(blocks), PROGRAMS))
    named = dict(blocks=blocks, n_blocks=len(blocks), layout=space.layout, hyper=space.hyper,
                 control=space.control, TYPE=TYPES[kind.dtype], G_TYPE=TYPES[p.g_dtype], **others)
    with torch.cuda.device_of(space.partials):
        arch = 0 if INTERPRETED else driver.active.get_current_target().arch
        compiled = kernel[(programs,)](*moving, **named, **options(arch))
        if not (CAN_PREPARE and isinstance(compiled, CompiledKernel) and is_plain(kernel)):
            return
        rest = (named[name] for name in kernel.arg_names[len(moving):])
        rest = tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in rest)
        if key not in PREPARED:
            finalize(space, PREPARED.pop, key, None)
        PREPARED[key] = Launch(
            compiled, compiled.run, driver.active.get_current_device(), programs,
            compiled.function, compiled.packed_metadata, rest)
