"""How long a call takes, and the memory it has: how much, how fast, behind which cache."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def wait(device: torch.device) -> None:
    """Return when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(call: Callable[[], object], device: torch.device, queued: bool = False) -> float:
    """Return how long `call` takes on an idle device, in milliseconds.

    On a GPU the time between two events of the stream, so the host's wait is not in it; where the
    host is slower than the device, its gaps are. queued: a GPU first idles 0.2 ms or so, by whose
    end the host has launched `call`: for a graph, whose one launch is no part of what it does.
    """
    wait(device)
    if device.type != "cuda":
        before = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - before)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(400_000)  # cycles
    start.record(torch.cuda.current_stream(device))
    call()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end)


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache in bytes; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), os.sysconf("SC_LEVEL2_CACHE_SIZE"), 0)
    except (AttributeError, OSError, ValueError):
        return 0


def free_bytes(device: torch.device) -> int | None:
    """Return how much of the device's memory can still be had; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kib[0]) if kib else None


def bandwidth(device: torch.device, nbytes: int | None = None, reps: int = 10) -> dict[str, float]:
    """Return the memory bandwidth of STREAM's copy (a = b) and triad (a = b + s c).

    nbytes: size of each of the three float32 buffers; default 256 MiB, on a GPU 1 GiB, beside whose
    half millisecond a launch is little, and never less than four times the last-level cache. The
    median of `reps` passes counts; copy moves 2 and triad 3
    buffers, without the reads that a CPU may add before it writes.

    Returns {"copy": GB/s, "triad": GB/s, "buffer_bytes": nbytes}, with 1 GB = 1e9 bytes.
    """
    least = 2**30 if device.type == "cuda" else 2**28
    nbytes = nbytes or max(least, 4 * cache_bytes(device))
    a, b, c = (torch.full((nbytes // 4,), x, device=device) for x in (0.0, 1.0, 2.0))

    def gb_per_s(buffers: int, call: Callable[[], object]) -> float:
        call()
        ms = median(elapsed_ms(call, device) for _ in range(reps))
        return buffers * a.nbytes / ms / 1e6

    return {
        "copy": gb_per_s(2, lambda: a.copy_(b)),
        "triad": gb_per_s(3, lambda: torch.add(b, c, alpha=3.0, out=a)),
        "buffer_bytes": a.nbytes,
    }
