"""Optimizers stepped with given gradients, and timed in turn."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.speed.bandwidth import cache_bytes, elapsed_ms, wait
from bench.speed.contenders import Contender
from fastsam import SAM


def spread(times: Sequence[float]) -> dict[str, float]:
    """Return the median, and what a fifth and four fifths of the times are below."""
    numbers = torch.tensor(times, dtype=torch.float64)
    return {f"p{k}": numbers.quantile(k / 100).item() for k in (20, 50, 80)}


class Runner:
    """A contender over its own copy of the weights; the gradients may be shared with others.

    passes: the gradients of the first and of the second pass, fixed tensors.
    phases: (gradients, call) pairs that make one step: the climb and the return, or, for plain
    SGD, the one step with the second pass's gradients. captured: whether they are CUDA graphs.
    kept: the most bytes of state that the optimizer has kept after a phase. first_ms: how long the
    first step took, compilation included.
    """

    def __init__(self, contender: Contender, weights: list[Tensor],
                 passes: tuple[list[Tensor], ...], hyper: dict) -> None:  # fmt: skip
        self.contender, self.passes = contender, passes
        self.params = [nn.Parameter(w.clone()) for w in weights]
        self.opt = contender.optimizer(self.params, hyper)
        if contender.method == "sgd":
            self.phases = [(passes[1], self.opt.step)]
        else:
            self.phases = [(passes[0], self.opt.first_step), (passes[1], self.opt.second_step)]
        self.captured, self.kept = False, 0
        self.ms: list[float] = []
        self.first_ms: float | None = None

    def point_at(self, grads: list[Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g

    def step(self) -> Iterator[None]:
        """Do a step, and yield after each of its phases."""
        for grads, call in self.phases:
            self.point_at(grads)
            call()
            self.kept = max(self.kept, kept_bytes(self.opt))
            yield

    def capture(self) -> None:
        """Make a CUDA graph of each phase, to be replayed from now on."""
        captured = []
        for grads, call in self.phases:
            self.point_at(grads)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            captured.append((grads, graph.replay))
        self.phases, self.captured = captured, True

    def time(self, first: list[Tensor], flush: Tensor) -> None:
        """Time a step: its phases in milliseconds, each begun with cold caches, as they are after
        a backward pass. first: fresh values of the first pass, which some peers overwrite."""
        for g, value in zip(self.passes[0], first, strict=True):
            g.copy_(value)
        total = 0.0
        for grads, call in self.phases:
            self.point_at(grads)
            flush.sum()
            total += elapsed_ms(call, flush.device, queued=self.captured)
        self.ms.append(total)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for x in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(x)


def kept_bytes(opt: Any) -> int:
    """Return the bytes of the state that an optimizer keeps now, weights and gradients aside."""
    base = [opt.base_optimizer.state] if hasattr(opt, "base_optimizer") else []
    if not isinstance(opt, SAM):  # some share one state with their base
        return sum({id(t): t.nbytes for t in tensors_in([opt.state, *base])}.values())
    foreign = [] if opt.backend_report()["fused_base"] else base
    return sum(opt.memory_report().values()) + sum(t.nbytes for t in tensors_in(foreign))


def launches(runner: Runner) -> int | None:
    """Return how many kernels, copies and fills a step puts on a GPU; None where not known."""
    if runner.params[0].device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for grads, call in runner.phases:
            runner.point_at(grads)
            call()
        torch.cuda.synchronize(runner.params[0].device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return count_launches(json.loads(path.read_text())) or None


def count_launches(trace: dict[str, Any]) -> int:
    """Return the number of GPU activities in a Chrome trace of torch.profiler."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sum(event.get("cat") in kinds for event in trace["traceEvents"])


def random_like(shapes: Sequence[Any], dtype: torch.dtype, device: torch.device, seed: int,
                scale: float = 1.0) -> list[Tensor]:  # fmt: skip
    """Return normally distributed tensors of standard deviation `scale`."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(s, generator=generator, device=device).mul_(scale).to(dtype) for s in shapes
    ]


def line_up(found: list[Contender], shapes: list[torch.Size], hyper: dict, dtype: torch.dtype,
            device: torch.device, graph: bool) -> tuple[list[Runner], list[Tensor]]:  # fmt: skip
    """Return a runner per contender after three steps, in CUDA graphs if `graph`, and the first
    pass's gradients as they were. All start from the same weights and share the gradients."""
    weights = random_like(shapes, dtype, device, seed=0, scale=0.1)
    passes = tuple(random_like(shapes, dtype, device, seed, scale=0.01) for seed in (1, 2))
    runners, first = [], [g.clone() for g in passes[0]]
    for contender in found:
        runners.append(Runner(contender, weights, passes, hyper))
        start = time.perf_counter()
        for i in range(3):
            list(runners[-1].step())
            if i == 0:
                wait(device)
                runners[-1].first_ms = 1e3 * (time.perf_counter() - start)
        if graph:
            runners[-1].capture()
    return runners, first


def race(runners: list[Runner], first: list[Tensor], reps: int | None) -> None:
    """Time all runners in turn, in rounds that each begin with another one.

    first: values for the first pass's gradients. reps: rounds; None: 100 on a GPU, else 20, but
    no more than a minute takes, and at least 5.
    """
    device = runners[0].params[0].device
    flush = torch.ones(max(2**26, 2 * cache_bytes(device)) // 4, device=device)
    rounds, start = reps or (100 if device.type == "cuda" else 20), time.monotonic()
    for i in range(-1, rounds):
        if reps is None and i >= 5 and time.monotonic() - start > 60:
            break
        k = i % len(runners)
        for runner in runners[k:] + runners[:k]:
            runner.time(first, flush)
    for runner in runners:
        del runner.ms[0]  # a round to warm up, with a graph's first replay
