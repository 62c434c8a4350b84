"""Training images per second, and where the time goes: `train`'s step beside the plain recipe.

The loops of a method take turns on the same machine, so that another program's load meets them all,
and their ratio is taken within each turn.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
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


def take_turn(loop: Loop, steps: int, device: torch.device) -> tuple[float, list[float]]:
    """Return the seconds that `steps` steps took and each one's milliseconds.

    Waits for the device at the beginning and at the end only.
    """
    clock = Clock(device)
    for _ in range(loop.prefetched):
        loop.step()
    wait(device)
    start, moments = time.perf_counter(), [clock.now()]
    for _ in range(steps):
        loop.step()
        moments.append(clock.now())
    wait(device)
    seconds = time.perf_counter() - start
    return seconds, [clock.ms(a, b) for a, b in pairwise(moments)]


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
        _, whole = take_turn(replace(loop, prefetched=0), steps, device)
    parts = dict.fromkeys(PARTS, 0.0)
    for part, start, end in clock.marks:
        parts[part] += clock.ms(start, end) / steps
    parts["forward and backward"] = sum(whole) / steps - sum(parts.values())
    return parts


def race(loops: list[Loop], steps: int, turns: int, device: torch.device) -> list[dict[str, Any]]:
    """Return each loop's times: the loops take turns, after one turn that does not count."""
    seconds: list[list[float]] = [[] for _ in loops]
    step_ms: list[list[float]] = [[] for _ in loops]
    method, total = loops[0].config.method, len(loops) * (turns + 2)
    bar = tqdm(total=total, desc=method, disable=None, leave=False)
    for turn in range(-1, turns):
        for i, loop in enumerate(loops):
            took, each = take_turn(loop, steps, device)
            if turn >= 0:
                seconds[i].append(took)
                step_ms[i] += each
            bar.update()
    results = []
    for i, loop in enumerate(loops):
        p20, p50, p80 = np.percentile(step_ms[i], [20, 50, 80]).tolist()
        ratios = [mine / fast for mine, fast in zip(seconds[i], seconds[0], strict=True)]
        results.append({
            "loop": loop.name,
            "images_per_second": steps * loop.config.batch_size / median(seconds[i]),
            "step_ms": {"p20": p20, "p50": p50, "p80": p80},
            "fast_is_faster": median(ratios),
            "breakdown_ms": breakdown(loop, steps, device),
        })  # fmt: skip
        bar.update()
    bar.close()
    return results


def report(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table; times in milliseconds a step."""
    columns = ("p20", "p50", "p80", "fast is", *PARTS)
    head = f"{'method':15} {'loop':10} {'images/s':>9}"
    lines = [head + "".join(f" {name:>{max(8, len(name))}}" for name in columns)]
    for row in rows:
        times = "".join(f" {row['step_ms'][p]:8.1f}" for p in ("p20", "p50", "p80"))
        parts = "".join(
            f" {row['breakdown_ms'][p]:{max(8, len(p))}.1f}" for p in PARTS if row["breakdown_ms"]
        )
        ratio = f"{row['fast_is_faster']:.2f}x"
        name = f"{method_name(row['method']):15} {row['loop']:10} {row['images_per_second']:9.1f}"
        lines.append(f"{name}{times} {ratio:>8}{parts}")
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


def throughput(configs: list[Config], options: Options, rows_path: Path | None = None) -> int:
    """Measure every config's method, print a table, append rows; return the exit code.

    1, and no speed, when a fast loop does not train as the plain mathematics does. Raises
    ValueError for what cannot be measured here.
    """
    device, git = usable_device(configs[0].device), git_hash()
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
    steps = options.steps or (30 if device.type == "cuda" else 1)
    rows = []
    for config, error in zip(configs, errors, strict=True):
        shared = {"data": f"random uint8, {options.images} images", "steps": steps}
        shared |= {"errors": error, "config": asdict(config), "options": asdict(options)}
        shared |= provenance(device, git)
        for result in race(loops_of(config, data, options), steps, options.turns, device):
            rows.append({"kind": "throughput", "method": config.method} | result | shared)
    if rows_path is not None:
        rows_path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(rows_path, rows)
        print(f"wrote {rows_path}")
    print(f"\n{report(rows)}")
    return 0
