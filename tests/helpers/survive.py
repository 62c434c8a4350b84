"""Kill a training at random moments until it has ended, and compare it with one left alone.

`python -m tests.helpers.survive --kills 30` (`make survive`) does it longer than the suite, method
by method. Every step writes a checkpoint, so that kills fall into writes as well.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from bench.__main__ import main as bench
from bench.training.checkpoint import load_checkpoint

TIMES = {"seconds", "images_per_second", "train_seconds", "time"}  # which no two runs share
SMALL = ["--width", "4", "--threads", "1", "--eval-linf", "8", "--eval-l2", "128",
         "--eval-steps", "1"]  # fmt: skip
METHODS = (
    ["--method", "fsam"],
    ["--method", "at-linf", "--optimizer", "asam", "--attack-steps", "2", "--awp-gamma", "0.01"],
    ["--method", "trades", "--optimizer", "sam-micro", "--attack-steps", "2"],
    ["--method", "sam", "--base", "adamw", "--amp", "fp16", "--label-noise", "0.3"],
    ["--method", "sam-late", "--model", "vgg16bn"],
)


def same(a, b) -> bool:
    """Bit-equality of nested state."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(path: Path) -> dict:
    checkpoint = load_checkpoint(path)
    return {k: v for k, v in checkpoint.items() if k not in ("history", "trained")}


def learning(out: Path) -> list[dict]:
    """The rows of metrics without the times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def difference(a: Path, b: Path) -> str:
    """What two runs' directories differ in, times left out; "" where they are the same."""
    if (names := {p.name for p in a.iterdir()}) != (others := {p.name for p in b.iterdir()}):
        return f"files {sorted(names ^ others)}"
    summaries = [json.loads((out / "summary.json").read_text()) for out in (a, b)]
    found = [name for name in ("last.pt", "best.pt") if not same(state(a / name), state(b / name))]
    found += ["metrics.jsonl"] if learning(a) != learning(b) else []
    found += [f"summary's {k}" for k in sorted(set().union(*summaries) - TIMES)
              if summaries[0].get(k) != summaries[1].get(k)]
    return ", ".join(found)


def quietly(arguments: list[str]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    sys.exit(bench(arguments))


def start(options: list[str], out: Path) -> multiprocessing.Process:
    """Start a process of its own, forked from one that has done nothing but import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.experiments.train_and_evaluate", "torch._dynamo",
                                    "sklearn.datasets"])
    arguments = ["train", *SMALL, *options, "--out", str(out)]
    process = context.Process(target=quietly, args=(arguments,))
    process.start()
    return process


def end(process: multiprocessing.Process) -> int:
    process.join()
    return process.exitcode


def hit(process: multiprocessing.Process, path: Path, number: int) -> int:
    """Signal a process at a random moment after it has written `path`, unless it ends before.

    Returns its exit code."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.is_alive():
        if path.exists() and path.stat().st_mtime_ns > before:
            break
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
    return end(process)


def survive(folder: Path, options: list[str], hits: list[int]) -> tuple[list[int], str]:
    """Train in folder/whole, and in folder/cut under these signals and then to the end.

    Returns the exit codes of what was hit, and how the two differ.
    """
    assert end(start(options, folder / "whole")) == 0
    options = [*options, "--save-every", "0"]
    codes = [hit(start(options, folder / "cut"), folder / "cut" / "last.pt", n) for n in hits]
    assert end(start(options, folder / "cut")) == 0
    return codes, difference(folder / "whole", folder / "cut")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of each method (default 30)")
    kills, wrong = parser.parse_args().kills, 0
    for method in METHODS:
        options = [*method, "--epochs", str(3 + 2 * kills)]
        with tempfile.TemporaryDirectory() as folder:
            codes, found = survive(Path(folder), options, [signal.SIGKILL] * kills)
        killed = codes.count(-signal.SIGKILL)
        wrong += bool(found) or killed < kills
        print(f"{' '.join(method)}: {killed} kills, {found or 'the same bits'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
