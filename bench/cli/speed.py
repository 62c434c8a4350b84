"""`bench step`, `throughput` and `gpu`: what is measured of time."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.cli.parse import Command, options_of
from bench.cli.shared import refuse_beside
from bench.settings.config import Config
from bench.settings.setting import setting, settings_of
from bench.settings.speed import Options, StepConfig

TIMED = ("sgd", "sam", "asam", "fsam", "at-linf")


@dataclass(kw_only=True)
class OfStep:
    host: bool = setting(
        False, "instead: how long a step keeps the host, without a GPU, at 10, 62, 161 and 1000 "
        "tensors (or --tensors) of one element",
    )
    rows: Path | None = setting(
        None, "append a row per optimizer to this JSONL file", metavar="FILE"
    )


@dataclass(kw_only=True)
class OfThroughput:
    methods: tuple[str, ...] = setting(
        TIMED, "of sgd, sam, asam, fsam, fasam, msam, looksam, gsam, at-linf, at-l2",
        metavar="METHOD...",
    )
    amp: str = setting("bf16", "bf16 or off")
    channels_last: bool = setting(True, "torch's channels_last memory format")
    rows: Path | None = setting(None, "append a row per loop to this JSONL file", metavar="FILE")


@dataclass(kw_only=True)
class OfGpu:
    minutes: float | None = setting(
        None, "start nothing that would not end within so many minutes"
    )
    list: bool = setting(False, "show the pieces and how they ended; run none")
    only: tuple[str, ...] | None = setting(None, "these pieces, done or not", metavar="NAME...")
    out: Path | None = setting(
        None, "for state.json, log.txt and the rows", default="runs/gpu", metavar="DIR"
    )
    predict: bool = setting(
        False, "print what a model of the compiled kernels says of GPUs that are not here"
    )
    gpu: tuple[str, ...] | None = setting(
        None, "for --predict: A100, H100, H200, B200 or RTX4090", default="H200", metavar="GPU..."
    )
    rows: Path | None = setting(
        None, "for --predict: append a row per step to this JSONL file", metavar="FILE"
    )


def run_step(options: dict[str, Any]) -> int:
    from bench.speed.step import step

    given = {k: x for k, x in options.items() if k not in settings_of(OfStep)}
    if options["host"]:
        return run_host(given, options["rows"])
    if "methods" in given:
        given["methods"] = tuple(dict.fromkeys(given["methods"]))
    return step(StepConfig(**given), options["rows"])


def run_host(given: dict[str, Any], rows: Path | None) -> int:
    from bench.speed.host import HostConfig, host

    other = given.keys() - {"tensors", "reps"}
    if other:
        raise ValueError(f"--host takes --tensors, --reps and --rows, not --{sorted(other)[0]}")
    if "tensors" in given:
        given["tensors"] = (given["tensors"],)
    return host(HostConfig(**given), rows)


def run_throughput(options: dict[str, Any]) -> int:
    from bench.settings.config import check_used, resolve
    from bench.speed.throughput import throughput

    check_used(options["methods"], options)
    given = {k: options[k] for k in settings_of(Options) if k in options}
    if "beside" in given:
        given["beside"] = tuple(given["beside"])
    configs = [resolve(m, "sam-at-cifar10", options) for m in options["methods"]]
    configs = [replace(c, data="random") for c in configs]
    return throughput(configs, Options(**given), options["rows"])


def run_gpu(options: dict[str, Any]) -> int:
    if options["predict"]:
        from bench.speed.predict import predict

        refuse_beside("predict", ("minutes", "list", "only", "out"), options)
        return predict(options["gpu"] or ["H200"], options["rows"])
    if options["rows"]:
        raise ValueError("--rows belongs to --predict; what is measured goes to --out")
    if options["gpu"]:
        raise ValueError("--gpu belongs to --predict; what is measured is of the GPU that is here")
    from bench.speed.gpu_session import gpu

    out = options["out"] or Path("runs/gpu")
    return gpu(out, options["minutes"], options["only"], options["list"])


COMMANDS = (
    Command(
        "step", "time the optimizer's step alone beside its peers, after checking that they agree",
        run_step, OfStep, options_of(StepConfig),
    ),
    Command(
        "throughput", "images/s of training and where the time goes, beside the plain recipe, on "
        "random images", run_throughput, OfThroughput,
        (*options_of(Config, "model", "width", "batch_size", "attack_steps", "augment", "backend",
                     "device", "threads"), *options_of(Options)),
    ),
    Command(
        "gpu", "on a CUDA device: parity, then every measurement; repeat the command to go on with "
        "it", run_gpu, OfGpu,
    ),
)
