"""Time of the optimizer's step alone: fastsam's backends beside their peers, parity first."""

import ctypes
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.devices import usable_device
from bench.files import append_jsonl
from bench.models import MODELS
from bench.provenance import git_hash, package_version, stamp
from bench.settings.speed import TENSORS, StepConfig
from bench.speed.bandwidth import bandwidth, free_bytes
from bench.speed.contenders import (
    BASE_STATES,
    FRIENDLY,
    KEEPING,
    Contender,
    bytes_per_parameter,
    contenders,
)
from bench.speed.parity import TOLERANCE, parity_error
from bench.speed.timing import Runner, launches, line_up, race, spread
from bench.spelling import meant
from fastsam import SAM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PERTURBATION: dict[str, float] = {"rho": 0.1, "sigma": 1.0, "lmbda": 0.9, "alpha": 0.4}
BASE_HYPER: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
}


def hyper(config: StepConfig) -> dict[str, Any]:
    return PERTURBATION | BASE_HYPER[config.base]


def model_shapes(name: str, width: int | None) -> list[torch.Size]:
    """Return the shapes of a model's parameters, which are not made.

    Raises ValueError for an unknown model, or for a width of one of torchvision's.
    """
    with torch.device("meta"):
        if name in MODELS:
            model = MODELS[name](3, 10, **({} if width is None else {"width": width}))
            return [p.shape for p in model.parameters()]
        from torchvision import models

        if name not in (known := [*MODELS, *models.list_models(module=models)]):
            raise ValueError(
                f"unknown model {name!r}{meant(name, known)}; choose one of "
                f"{', '.join(MODELS)}, or a classification model of torchvision, such as resnet34"
            )
        if width is not None:
            raise ValueError(f"width is an option of {', '.join(MODELS)}, not of {name!r}")
        model = models.get_model(name, weights=None, num_classes=10)
        return [p.shape for p in model.parameters()]


def workload(config: StepConfig) -> tuple[str, list[torch.Size]]:
    """Return the name and the shapes of the parameters to step."""
    if config.params is None:
        name = config.model or "preactresnet18"
        width = "" if config.width is None else f" of width {config.width}"
        return name + width, model_shapes(name, config.width)
    k = config.tensors or TENSORS
    sizes = [config.params // k + (i < config.params % k) for i in range(k)]
    return f"{k} equal tensors", [torch.Size([n]) for n in sizes]


def refuse_too_large(found: list[Contender], n: int, config: StepConfig,
                     device: torch.device) -> None:  # fmt: skip
    """Raise ValueError when n parameters for every contender do not fit in the free memory."""
    element, needed, free = DTYPES[config.dtype].itemsize, 0, free_bytes(device)
    for c in found:  # weights, saved weights, temporaries; states
        states = BASE_STATES[config.base] + (c.method in FRIENDLY)
        states += KEEPING.count(c.method) + (c.method == "looksam")
        needed += n * (3 * element + states * c.state)
    needed += 4 * n * element  # the weights to start from, gradients, and their fresh values
    if free is not None and needed > free:
        raise ValueError(
            f"{n} parameters in {len(found)} optimizers need about {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; take fewer --methods at a time or fewer parameters"
        )


def keep_freed_memory() -> None:
    """Make glibc serve every allocation from its heap, and give nothing back to the system.

    Raises ValueError where the C library is another.
    """
    trim_threshold, most_maps = -1, -4  # malloc.h's M_TRIM_THRESHOLD and M_MMAP_MAX
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        raise ValueError("keep-memory needs glibc's mallopt; leave --keep-memory out") from None
    if not (mallopt(trim_threshold, 2**31 - 1) and mallopt(most_maps, 0)):
        raise ValueError("mallopt refuses to keep memory; leave --keep-memory out")


def driver() -> str | None:
    """Return the NVIDIA driver's version, where nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split("\n")[0].strip()


def provenance(device: torch.device, git: str | None) -> dict[str, Any]:
    """Return `bench.provenance.stamp`, and the versions that matter to a step besides."""
    where = stamp(str(device), git)
    where["versions"] |= {
        "cuda": torch.version.cuda,
        "driver": driver() if device.type == "cuda" else None,
        "pytorch_optimizer": package_version("pytorch_optimizer"),
    }
    return where


def row(runner: Runner, error: float, config: StepConfig,
        speeds: dict[str, float]) -> dict[str, Any]:  # fmt: skip
    """Return one contender's numbers: times in ms, speeds in GB/s of 1e9 bytes.

    gb_per_s is what the method must move, `bytes`, over the median time: an implementation that
    moves more is slow by it. of_copy, of_triad: as parts of the same run's memory bandwidth.
    """
    contender, n = runner.contender, sum(p.numel() for p in runner.params)
    ms = spread(runner.ms)
    element = DTYPES[config.dtype].itemsize
    budget = bytes_per_parameter(contender.method, config.base, element, contender.state)
    gb_per_s = budget * n / ms["p50"] / 1e6
    ours = isinstance(runner.opt, SAM)
    return {
        "kind": "step",
        "method": contender.method,
        "implementation": contender.name,
        "speed_only": not error <= TOLERANCE[DTYPES[config.dtype]],
        "parity_error": error,
        "fused_base": runner.opt.backend_report()["fused_base"] if ours else None,
        "parameters": n,
        "tensors": len(runner.params),
        "ms": ms,
        "reps": len(runner.ms),
        "first_ms": runner.first_ms,
        "bytes_per_parameter": budget,
        "bytes": budget * n,
        "gb_per_s": gb_per_s,
        "of_copy": gb_per_s / speeds["copy"],
        "of_triad": gb_per_s / speeds["triad"],
        "launches": launches(runner),
        "state_bytes": runner.kept,
    }


def gate(found: list[Contender], config: StepConfig, device: torch.device) -> list[float] | None:
    """Return everyone's parity error; or None, after printing who is not what it claims."""
    dtype, limit = DTYPES[config.dtype], TOLERANCE[DTYPES[config.dtype]]
    errors = [parity_error(c, config.base, dtype, device, config.graph) for c in found]
    red = [(c, e) for c, e in zip(found, errors, strict=True) if c.exact and not e <= limit]
    for c, e in red:
        print(f"parity is red: {c.method} by {c.name} is off by {e:.1e}, allowed {limit:.0e}")
    return None if red else errors


def measure(config: StepConfig) -> list[dict[str, Any]] | None:
    """Return a row per contender, or None when one is red. Prints who is red and who is left out.

    Raises ValueError for what cannot be measured on this machine.
    """
    device, git = usable_device(config.device), git_hash()
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {config.device!r} cannot be timed; use cpu or cuda")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.keep_memory:
        keep_freed_memory()
    dtype, (label, shapes) = DTYPES[config.dtype], workload(config)
    found, left_out = contenders(
        config.methods, config.base, dtype, device, config.graph, config.compile
    )
    refuse_too_large(found, sum(shape.numel() for shape in shapes), config, device)
    for line in left_out:
        print(f"left out: {line}")
    # before the gate, which compiles the same functions: the first step is timed too
    runners, first = line_up(found, shapes, hyper(config), dtype, device, config.graph)
    errors = gate(found, config, device)
    if errors is None:
        return None
    speeds = bandwidth(device)
    race(runners, first, config.reps)
    shared = {"workload": label, "base": config.base, "dtype": config.dtype, "graph": config.graph}
    shared |= {"keep_memory": config.keep_memory}
    shared |= {"bandwidth": speeds, "config": asdict(config), "hyper": hyper(config)}
    shared |= provenance(device, git)
    return [row(r, e, config, speeds) | shared for r, e in zip(runners, errors, strict=True)]


def step(config: StepConfig, rows_path: Path | None = None) -> int:
    """Measure, append the rows to `rows_path`, print a table; return the exit code, 1 on red."""
    from bench.speed.step_report import step_report

    rows = measure(config)
    if rows is None:
        print("no speed without parity: nothing was timed")
        return 1
    if rows_path is not None:
        append_jsonl(rows_path, rows)
        print(f"wrote {rows_path}")
    print(f"\n{step_report(rows)}")
    return 0
