"""Training images per second, and where the time goes: `train`'s step beside the plain recipe.

All loops of all methods take turns on the same machine, so that another program's load meets them
all, and their ratios are taken within each turn: by the clock, and by this process's processor time
on all cores, which other programs lengthen less. The plain recipe's loader processes are not in it.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm

from bench.devices import usable_device
from bench.files import append_jsonl
from bench.provenance import git_hash
from bench.settings.config import Config
from bench.settings.names import method_name
from bench.speed.bandwidth import wait
from bench.speed.baselines import PerParameterSAM, why_not_compile
from bench.speed.step import provenance
from bench.speed.timing import spread
from bench.speed.training_loops import (
    METHODS,
    TOLERANCE,
    Loop,
    Options,
    disagreement,
    graph_loop,
    loops_of,
    random_data,
)

PARTS = ("data", "attack", "forward and backward", "climb", "return and step")


class Clock:
    """Moments on the device: events on a GPU, which nothing waits for, else the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)

    def timed(self, part: str, call: Callable) -> Callable:
        """Return `call`, which now leaves a mark of when it began and ended."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = call(*args, **kwargs)
            self.marks.append((part, start, self.now()))
            return result

        return marked


class Turn(NamedTuple):
    """What a few steps took: seconds by the clock and of the processor, and each step's ms."""

    seconds: float
    processor: float
    ms: list[float]


def take_turn(loop: Loop, steps: int, device: torch.device) -> Turn:
    """Take `steps` steps. Waits for the device at the beginning and at the end only."""
    clock = Clock(device)
    for _ in range(loop.prefetched):
        loop.step()
    wait(device)
    start, processor, moments = time.perf_counter(), time.process_time(), [clock.now()]
    for _ in range(steps):
        loop.step()
        moments.append(clock.now())
    wait(device)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return Turn(seconds, processor, [clock.ms(a, b) for a, b in pairwise(moments)])


def breakdown(loop: Loop, steps: int, device: torch.device) -> dict[str, float] | None:
    """Return milliseconds a step by part, from a run of its own: forward and backward of the
    training passes, loss and counts included, are what the others leave of the whole. None for a
    graph, which has no parts."""
    if loop.name == "graph":
        return None
    for _ in range(loop.prefetched):
        loop.step()
    last = "second_step" if isinstance(loop.opt, PerParameterSAM) else "step"
    calls = [(loop, "batch", "data"), (loop, "attack", "attack")]
    calls += [(loop.opt, last, "return and step")]
    if loop.config.rho is not None:
        calls.append((loop.opt, "first_step", "climb"))
    clock = Clock(device)
    with ExitStack() as patches:
        for owner, method, part in calls:
            call = clock.timed(part, getattr(owner, method))
            patches.enter_context(patch.object(owner, method, call))
        whole = take_turn(replace(loop, prefetched=0), steps, device).ms
    parts = dict.fromkeys(PARTS, 0.0)
    for part, start, end in clock.marks:
        parts[part] += clock.ms(start, end) / steps
    parts["forward and backward"] = sum(whole) / steps - sum(parts.values())
    return parts


def race(loops: list[Loop], steps: int, turns: int, device: torch.device) -> list[dict[str, Any]]:
    """Return each loop's times: the loops take turns, after one turn that does not count. SGD's
    first loop, and each method's, is what the others' times are divided by."""
    taken: list[list[Turn]] = [[] for _ in loops]
    bar = tqdm(total=len(loops) * (turns + 2), disable=None, leave=False)
    for turn in range(-1, turns):
        for loop, mine in zip(loops, taken, strict=True):
            bar.set_description(loop.config.method)
            took = take_turn(loop, steps, device)
            mine += [took] if turn >= 0 else []
            bar.update()
    methods = [loop.config.method for loop in loops]
    results = []
    for loop, mine in zip(loops, taken, strict=True):
        results.append({
            "loop": loop.name,
            "images_per_second": steps * loop.config.batch_size / median(t.seconds for t in mine),
            "step_ms": spread([ms for t in mine for ms in t.ms]),
            "processor_ms": 1e3 / steps * median(t.processor for t in mine),
            "fast_is_faster": ratios(mine, taken[methods.index(loop.config.method)])["clock"],
            "times_sgd": ratios(mine, taken[methods.index("sgd")]) if "sgd" in methods else None,
            "breakdown_ms": breakdown(loop, steps, device),
        })  # fmt: skip
        bar.update()
    bar.close()
    return results


def ratios(mine: list[Turn], others: list[Turn]) -> dict[str, float]:
    """Return how many times as long as the other loop's my turns took: the turns' medians."""
    pairs = list(zip(mine, others, strict=True))
    return {"clock": median(a.seconds / b.seconds for a, b in pairs),
            "processor": median(a.processor / b.processor for a, b in pairs)}  # fmt: skip


def report(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table; times in milliseconds a step. "x SGD" is by processor time on a
    CPU, else by the clock."""
    columns = ("p20", "p50", "p80", "fast is", "x SGD", *PARTS)
    head = f"{'method':15} {'loop':10} {'images/s':>9}"
    lines = [head + "".join(f" {name:>{max(8, len(name))}}" for name in columns)]
    for row in rows:
        ms = "".join(f" {row['step_ms'][p]:8.1f}" for p in ("p20", "p50", "p80"))
        parts = "".join(
            f" {row['breakdown_ms'][p]:{max(8, len(p))}.1f}" for p in PARTS if row["breakdown_ms"]
        )
        by = "processor" if row["device"].startswith("cpu") else "clock"
        times = f"{row['times_sgd'][by]:.3f}" if row["times_sgd"] else ""
        ratio = f"{row['fast_is_faster']:.2f}x"
        name = f"{method_name(row['method']):15} {row['loop']:10} {row['images_per_second']:9.1f}"
        lines.append(f"{name}{ms} {ratio:>8} {times:>8}{parts}")
    return "\n".join(lines)


def allow_tf32(allowed: bool | None) -> None:
    if allowed is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def agrees(method: str, errors: dict[str, float]) -> bool:
    """Print how far a method's fast loop is from the plain mathematics; return whether it may be.
    A nan is too far."""
    red = [part for part, allowed in TOLERANCE.items() if not errors[part] <= allowed]
    for part in red:
        error = f"{errors[part]:.0e}, allowed {TOLERANCE[part]:.0e}"
        print(f"parity is red: {method}'s {part} is off by {error}")
    if not red:
        print(f"{method} agrees with the plain mathematics: training to {errors['training']:.0e}, "
              f"attack to {errors['attack']:.0e}; as configured, losses to "
              f"{errors['precision']:.0e}")  # fmt: skip
    return not red


def steps_of_a_turn(configs: list[Config], options: Options, device: torch.device) -> int:
    """Return a number of steps in which every method climbs as often as in any other turn.

    Raises ValueError where another number was asked for.
    """
    period = math.lcm(*(config.interval for config in configs))
    if options.steps is None:
        return math.ceil((30 if device.type == "cuda" else 1) / period) * period
    if options.steps % period:
        raise ValueError(f"steps {options.steps} end within a period of {period} steps, of which "
                         "one climbs; use a multiple of it")
    return options.steps


def throughput(configs: list[Config], options: Options, rows_path: Path | None = None) -> int:
    """Measure every config's method, print a table, append rows; return the exit code.

    1, and no speed, when a fast loop does not train as the plain mathematics does. Raises
    ValueError for what cannot be measured here.
    """
    device, git = usable_device(configs[0].device), git_hash()
    steps = steps_of_a_turn(configs, options, device)
    if options.images < configs[0].batch_size:
        raise ValueError(
            f"{options.images} images are less than a batch of {configs[0].batch_size}"
        )
    if device.type == "cuda":
        if device.index is not None:  # torch refuses to set "cuda"
            torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if configs[0].threads is not None:
        torch.set_num_threads(configs[0].threads)
    for config in configs:
        if config.method not in METHODS:
            raise ValueError(
                f"there is no plain recipe of {config.method!r}; choose from {', '.join(METHODS)}"
            )
    if "graph" in options.beside and device.type != "cuda":
        raise ValueError(f"a graph needs a CUDA device, not {str(device)!r}; leave it out")
    if options.compile and (obstacle := why_not_compile(device)):
        raise ValueError(f"torch.compile does not work here ({obstacle}); leave --compile out")
    errors = [disagreement(config, options) for config in configs]
    agreed = [agrees(c.method, e) for c, e in zip(configs, errors, strict=True)]
    for c in configs if "graph" in options.beside else ():
        unattacked = replace(c, eps=None)  # the graph's attack draws other numbers
        graph_errors = disagreement(unattacked, options, graph_loop)
        agreed.append(agrees(f"{c.method} in a graph", graph_errors))
    if not all(agreed):
        print("no speed without parity: nothing was timed")
        return 1
    allow_tf32(options.tf32)
    data = random_data(options)
    loops = [(loop, error) for config, error in zip(configs, errors, strict=True)
             for loop in loops_of(config, data, options)]  # fmt: skip
    shared = {"kind": "throughput", "data": f"random uint8, {options.images} images",
              "steps": steps, "options": asdict(options)} | provenance(device, git)  # fmt: skip
    results = race([loop for loop, _ in loops], steps, options.turns, device)
    rows = [{"method": loop.config.method} | result | shared
            | {"errors": error, "config": asdict(loop.config)}
            for (loop, error), result in zip(loops, results, strict=True)]  # fmt: skip
    if rows_path is not None:
        append_jsonl(rows_path, rows)
        print(f"wrote {rows_path}")
    print(f"\n{report(rows)}")
    return 0
