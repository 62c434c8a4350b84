"""The threads in which a loop runs: torch's own, of its OpenMP.

They wait for work awake for a while: others would share the processor with them just when the
optimizer steps, after a backward pass. Where torch's OpenMP is not found, and in a forked child,
which has none of its parent's threads, a pool of Python's does it.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import carray, int64
from numba.core import cgutils
from numba.extending import intrinsic

from fastsam import choose
from fastsam.interrupts import surely

from .tables import Loop, compiled

ENVIRONMENT = 64  # bytes, with room, of what C's fegetenv writes: how numbers are rounded, flushed
SMALLEST, HALF = sys.float_info.min, 0.5  # of which the product is denormal


def openmp_of_torch() -> tuple[Callable, Callable] | None:
    """GOMP_parallel of the library that torch calls, and C's fegetenv; None where something that
    `call_in` needs is not found."""
    if sys.platform != "linux":
        return None
    try:
        # as the loader does for torch: what is there for the whole process comes first, such as an
        # OpenMP in LD_PRELOAD, then torch's own symbols and those of what it depends on
        process, torchs = (ctypes.CDLL(path) for path in (
            None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")))
        parallel = getattr(process, "GOMP_parallel", None) or torchs.GOMP_parallel
        environment, _ = process.fegetenv, process.fesetenv
    except (OSError, AttributeError):
        return None
    parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype, environment.argtypes = None, (ctypes.c_void_p,)
    return parallel, environment


def begin_anew() -> None:
    """Threads of the pool start as they are needed."""
    global pool
    pool = ThreadPoolExecutor(max_workers=1024, thread_name_prefix="fastsam")


openmp = openmp_of_torch()
begin_anew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=begin_anew)


def run_in(threads: int, loop: Loop, arguments: int) -> None:
    """Run a loop whose calls deal the work among themselves. An exception, such as a
    KeyboardInterrupt, leaves before the first begins, or when all are done."""
    if threads < 2:
        loop.call(arguments)
    elif openmp is None or choose.is_forked:
        run_in_pool(threads, loop, arguments)
    else:
        parallel, environment = openmp
        here = ctypes.create_string_buffer(ENVIRONMENT)
        environment(here)
        region = (ctypes.c_int64 * 3)(loop.address, arguments, ctypes.addressof(here))
        parallel(as_the_caller().address, ctypes.addressof(region), threads, 0)


@intrinsic
def call_in(context, environment, function, argument):
    """function(argument), with the caller's environment and back to this thread's own. Returns
    argument."""
    def generate(_, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        there, function, argument = (builder.inttoptr(x, byte) for x in args)
        own = builder.bitcast(cgutils.alloca_once(
            builder, ir.ArrayType(ir.IntType(64), ENVIRONMENT // 8)), byte)
        kind = ir.FunctionType(ir.IntType(32), [byte])
        get, put = (cgutils.get_or_insert_function(builder.module, kind, name)
                    for name in ("fegetenv", "fesetenv"))
        builder.call(get, [own])
        builder.call(put, [there])
        call = ir.FunctionType(ir.VoidType(), [byte]).as_pointer()
        builder.call(builder.bitcast(function, call), [argument])
        builder.call(put, [own])
        return args[2]

    return int64(environment, function, argument), generate


@cache
def as_the_caller() -> Loop:
    """What a thread of OpenMP's runs: a loop, with what is the calling thread's own: whether it
    takes denormal numbers for 0, which torch.set_flush_denormal sets."""
    @compiled
    def call(arguments):
        region = carray(arguments, 3)
        call_in(region[2], region[0], region[1])

    return call


def run_in_pool(threads: int, loop: Loop, arguments: int) -> None:
    helpers: list[Future[None]] = [Future() for _ in range(threads - 1)]

    def work() -> None:
        # no more threads, or the interpreter is about to end: those that there are do it all
        with suppress(RuntimeError):
            for helper in helpers:
                pool.submit(help_with, helper, loop, arguments, SMALLEST * HALF == 0)
        loop.call(arguments)

    surely(work, lambda: wait_for(helpers))


def help_with(helper: Future[None], loop: Loop, arguments: int, flushes: bool) -> None:
    """In a thread of the pool: run the loop, unless nobody waits for this helper. The pool's own
    future is lost where a Ctrl-C, or a thread that cannot start, comes when the work is queued.

    Args:
        flushes: whether the caller's thread takes denormal numbers for 0, which is a thread's own.
    """
    if helper.set_running_or_notify_cancel():
        try:
            torch.set_flush_denormal(flushes)
            loop.call(arguments)
        except BaseException as error:
            helper.set_exception(error)
        else:
            helper.set_result(None)


def wait_for(helpers: Iterable[Future[Any]]) -> None:
    """Until those that have begun are done; the others never begin. What one raised is raised then.
    """
    for error in [helper.exception() for helper in helpers if not helper.cancel()]:
        if error is not None:
            raise error
