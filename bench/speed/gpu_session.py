"""What wants a CUDA device, as one command that can be interrupted: `python -m bench gpu`.

The FIRST pieces take less than ten minutes (`--minutes 9.5`): parity (the tests that take longest
to doubt, compute-sanitizer over Friendly-SAM's step), then the optimizer's step, the kernels'
hardware counters, and training throughput. The command, given again, goes on with the rest: more
of each, and the whole tests. Each piece is a process of its own with a time limit, which appends
its rows as it ends; what ended is noted in state.json.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.files import write_json
from bench.provenance import ROOT, git_hash
from bench.speed.contenders import BASES
from bench.speed.gpu_tools import LEFT_OUT

LIMIT = 570  # seconds of a piece, and the most that an interruption costs
TIMED_OUT = 124  # the exit code of coreutils' timeout
RED = "parity is red"  # what `bench step` and `bench throughput` print then
PARITY_NEEDS = ("triton", "pytest", "pytest_benchmark", "hypothesis")
LONG = {"test_contract": 240, "test_sequences": 180, "test_launches": 120}  # seconds
# of the kernels' own tests, those that meet every kernel, type and path
PARITY = "every_method or adam_and_adamw or masters_of_16 or misaligned_gradients or several_blocks"
# The most valuable: what one command of ten minutes gets through, at the estimates below.
FIRST = (
    "parity-kernels", "parity-sequences", "memcheck-fsam", "racecheck-fsam",
    "step-preactresnet18-sgd-graph", "step-100m-sgd-graph", "step-wrn28-10-sgd-graph",
    "counters", "step-preactresnet18-sgd", "step-1b-fsam-sgd-graph",
    *(f"throughput-preactresnet18-{form}-{method}" for form in ("eager", "graph")
      for method in ("fsam", "sgd")),
)  # fmt: skip
# Of the rest, what is worth most: the trainings, where there are images, take four minutes.
NEXT = (
    *(f"accuracy-{method}" for method in ("sgd", "sam", "fsam")),
    "step-preactresnet18-peers-compiled", "step-preactresnet18-adamw-graph",
    "step-100m-adamw-graph", "step-100m-sgd", "step-1b-sam-sgd-graph",
    *(f"throughput-preactresnet18-{form}-{method}" for form in ("graph", "eager")
      for method in ("sam", "at-linf")),
    "memcheck", "racecheck",
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One command: `arguments` to this Python. estimate, limit: seconds. gate: parity, without
    which nothing after it is measured. rows: the JSONL file that it appends to, if any."""

    name: str
    arguments: tuple[str, ...]
    estimate: float
    limit: float = LIMIT
    gate: bool = False
    rows: Path | None = None


# ---- the agenda


def test_pieces() -> list[Piece]:
    """Return a piece per test file."""
    pieces = []
    for path in sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: path.name):
        name = "tests-" + path.stem.removeprefix("test_").replace("_", "-")
        arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider",
                     path.relative_to(ROOT).as_posix())
        if path.stem == "test_sequences":  # the other backends' are many, and no slower on a CPU
            arguments = (*arguments[:-1], "-k", "triton", arguments[-1])
        pieces.append(Piece(name, arguments, LONG.get(path.stem, 60)))
    return pieces


def parity_pieces() -> list[Piece]:
    """Return the gates: the tests that take longest to doubt, on the device."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    return [
        Piece("parity-kernels", (*pytest, "-k", f"({PARITY}) and not numba",
                                 "tests/backends/test_contract.py",
                                 "tests/backends/test_kernels.py"), 60, gate=True),
        Piece("parity-sequences", (*pytest, "-k", "any_sequence and triton",
                                   "tests/unit/test_sequences.py"), 60, gate=True),
        *(Piece(f"{check}-fsam", ("-m", "bench.speed.gpu_tools", check, "friendly"), 30, 120,
                gate=True)
          for check in ("memcheck", "racecheck")),
    ]  # fmt: skip


def step_pieces(rows: Path) -> list[Piece]:
    """Return a piece per workload, base and form, SGD's first."""
    billion = ("--params", "1000000000", "--methods")  # they fit for one method at a time
    workloads = {
        "preactresnet18": ("--model", "preactresnet18"),
        "wrn28-10": ("--model", "wrn28-10"),
        "100m": ("--params", "100000000"),
        "1b-plain": (*billion, "sgd"), "1b-sam": (*billion, "sam"), "1b-fsam": (*billion, "fsam"),
    }  # fmt: skip
    pieces = []

    def add(name: str, estimate: float, *options: str) -> None:
        arguments = ("-m", "bench", "step", "--device", "cuda", *options, "--rows", str(rows))
        pieces.append(Piece(name, arguments, estimate, rows=rows))

    for base, (name, size), graph in product(BASES, workloads.items(), ((), ("--graph",))):
        full_name = "-".join(("step", name, base, *(g.strip("-") for g in graph)))
        add(full_name, 30, *size, "--base", base, "--no-compile", *graph)
    add("step-preactresnet18-peers-compiled", 400, "--methods", "sam", "fsam", "--compile")
    return pieces


def throughput_pieces(rows: Path) -> list[Piece]:
    """Return, for every model and method, a piece each for the eager loops, the model compiled, as
    one CUDA graph, and both."""
    forms = {
        "eager": (),
        "compiled": ("--compile", "--beside", "eager"),
        "graph": ("--beside", "graph"),
        "compiled-graph": ("--compile", "--beside", "graph"),
    }
    models, methods = ("preactresnet18", "wrn28-10"), ("sgd", "sam", "fsam", "at-linf")
    pieces = []
    for model, (form, options), method in product(models, forms.items(), methods):
        arguments = ("-m", "bench", "throughput", "--device", "cuda", "--model", model,
                     "--methods", method, *options, "--rows", str(rows))  # fmt: skip
        estimate = 200 if "--compile" in options else 40
        pieces.append(Piece(f"throughput-{model}-{form}-{method}", arguments, estimate, rows=rows))
    return pieces


def agenda(out: Path) -> list[Piece]:
    """Return every piece in its order; rows go to files in `out`."""
    counted = out / "counters.jsonl"

    def program(*arguments: str, estimate: float, **how: Any) -> Piece:
        return Piece(arguments[0], ("-m", "bench.speed.gpu_tools", *arguments), estimate, **how)

    def trained(method: str, estimate: float) -> Piece:
        rows = out / "accuracy.jsonl"
        arguments = ("-m", "bench.speed.gpu_tools", "accuracy", method, str(rows))
        return Piece(f"accuracy-{method}", arguments, estimate, rows=rows)

    measured = [
        trained("sgd", 50), trained("sam", 90), trained("fsam", 90),
        *step_pieces(out / "step.jsonl"),
        program("counters", str(counted), estimate=50, rows=counted),
        *throughput_pieces(out / "throughput.jsonl"),
        program("memcheck", estimate=240), program("racecheck", estimate=240),
    ]  # fmt: skip
    order = (*FIRST, *NEXT, *(p.name for p in measured))
    return [
        *parity_pieces(), *sorted(measured, key=lambda p: order.index(p.name)), *test_pieces(),
    ]  # fmt: skip


# ---- running it


def code_digest() -> str:
    """Return a digest of the optimizer's and the kernels' sources: what is checked and timed."""
    paths = sorted(p for d in ("fastsam", "kernels") for p in (ROOT / d).rglob("*.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()[:12]


def read_state(out: Path) -> dict[str, dict[str, Any]]:
    """Return what has ended: {piece: {"exit", "seconds", "git", "note", "code", "device"}}.

    Raises ValueError when state.json is not that.
    """
    path = out / "state.json"
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as e:
        raise ValueError(f"{str(path)!r} cannot be read ({e}); remove it to start afresh") from e


def outcome(entry: dict[str, Any] | None, here: dict[str, str]) -> str:
    """Return "to do", "green", "left out", "timed out" or "failed". Only what ended with the
    present code on the present device counts."""
    if entry is None or any(entry[k] != x for k, x in here.items()):
        return "to do"
    return {0: "green", LEFT_OUT: "left out", TIMED_OUT: "timed out"}.get(entry["exit"], "failed")


def waiting(pieces: list[Piece], state: dict, here: dict[str, str]) -> list[Piece]:
    """Return the pieces not done: gates, then what was not tried yet, then what failed."""
    left = [(p, outcome(state.get(p.name), here)) for p in pieces]
    left = [(p, o) for p, o in left if o not in ("green", "left out")]
    return [p for p, o in sorted(left, key=lambda po: (not po[0].gate, po[1] != "to do"))]


def run_piece(piece: Piece, log: Path, limit: float) -> tuple[int, str]:
    """Run a piece for at most `limit` seconds; return its exit code and output, also in `log`."""
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    with open(log, "ab") as f:
        f.write(f"\n==== {piece.name}: python {' '.join(piece.arguments)}\n".encode())
        f.flush()
        start = f.tell()
        child = subprocess.Popen(
            [sys.executable, *piece.arguments], cwd=ROOT, env=env | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL, stdout=f, stderr=f,
            # a group to end it by, but no session of its own, which would outlive this one's
            preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
        finally:  # its children too: they would share the GPU with the next piece
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return code, log.read_bytes()[start:].decode(errors="replace")


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def headline(rows: list[dict[str, Any]]) -> str | None:
    """Return the numbers that a piece was run for, from the rows it added: Friendly-SAM's, if any;
    of its counters the worst."""
    rows = [row for row in rows if row.get("implementation", "fastsam triton") == "fastsam triton"]
    rows = [row for row in rows if row["method"] == "fsam"] or rows
    if not rows:
        return None
    row = rows[-1]
    if row["kind"] == "accuracy":
        return (f"{row['method']} {row['natural']:.1%} natural, "
                f"{row['robust']['linf']['1/255']:.1%} at l_inf 1/255")  # fmt: skip
    if row["kind"] == "throughput":
        speeds = {row["loop"]: f"{row['images_per_second']:.0f} {row['loop']}" for row in rows}
        return f"{row['method']}, images/s: {', '.join(speeds.values())}"
    if row["kind"] == "step":
        return (f"{row['method']} {row['ms']['p50']:.3g} ms, {row['of_copy']:.0%} of copy, "
                f"{row['launches']} launches")  # fmt: skip
    row = max(rows, key=lambda row: row["of_budget"])
    return f"{row['method']} at most {row['of_budget']:.2f} times its budget, in {row['kernel']}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def table(pieces: list[Piece], state: dict, here: dict[str, str]) -> str:
    """Return a line per piece: its name, outcome, seconds (estimated, where to do) and note."""
    width = max((len(p.name) for p in pieces), default=0)
    lines = []
    for p in pieces:
        o, entry = outcome(state.get(p.name), here), state.get(p.name, {})
        seconds = f"~{p.estimate:.0f}" if o == "to do" else f"{entry['seconds']:.0f}"
        note = "" if o == "to do" else entry["note"]
        lines.append(f"{p.name:{width}}  {o:9} {seconds:>5} s  {note}".rstrip())
    return "\n".join(lines)


def run(pieces: list[Piece], out: Path, here: dict[str, str], minutes: float | None = None,
        again: bool = False) -> int:  # fmt: skip
    """Run the pieces that are not done, note each in state.json, print a table last.

    here: {"code", "device"}, for which a note counts. minutes: start nothing whose estimate (its
    last duration, where it failed) does not fit in what is left of them. again: done pieces too.
    Returns 1 when a piece failed; parity that is not green ends the session at once. Raises
    ValueError as `read_state`.
    """
    out.mkdir(parents=True, exist_ok=True)
    state, start, failed = read_state(out), time.monotonic(), False
    for piece in pieces if again else waiting(pieces, state, here):
        left = float("inf") if minutes is None else 60 * minutes - (time.monotonic() - start)
        tried = outcome(state.get(piece.name), here) in ("failed", "timed out")
        estimate = max(piece.estimate, state[piece.name]["seconds"] if tried else 0)
        if estimate > left:
            print(f"{piece.name}: about {estimate:.0f} s do not fit in {left:.0f} s", flush=True)
            if piece.gate:
                break
            continue
        print(f"{piece.name}: about {estimate:.0f} s", flush=True)
        had, git, began = len(read_rows(piece.rows)), git_hash(), time.monotonic()
        code, output = run_piece(piece, out / "log.txt", min(piece.limit, left))
        note = headline(read_rows(piece.rows)[had:]) or last_line(output)
        state[piece.name] = {"exit": code, "seconds": round(time.monotonic() - began, 1),
                             "git": git, "note": note, **here}  # fmt: skip
        write_json(out / "state.json", state)
        if code in (0, LEFT_OUT):
            continue
        failed = True
        print("\n".join(output.splitlines()[-20:]), flush=True)
        if piece.gate or RED in output:
            print(f"{piece.name} is not green; a speed without parity is worth nothing: stopped")
            break
    print(f"\n{table(pieces, state, here)}\nnotes, rows and output are in {out}")
    print_beside_predicted(out, here["device"])
    return int(failed)


def print_beside_predicted(out: Path, device: str) -> None:
    """Print what was measured of the step in a graph beside what was predicted for the device."""
    from bench.speed.predict import beside_measured

    try:
        text = beside_measured(read_rows(out / "step.jsonl"), device)
    except ValueError as e:  # no Triton to compile with
        text = f"no prediction: {e}"
    if text:
        print(f"\nmeasured beside predicted, in a graph:\n{text}")


def gpu(out: Path, minutes: float | None = None, only: list[str] | None = None,
        show: bool = False) -> int:  # fmt: skip
    """Run the agenda, or the pieces named by `only`, done or not and whatever the gates' state;
    `show` lists it, and where there is no GPU, what any device has done.

    Raises ValueError without a CUDA device or what the tests of parity import, for minutes that
    are not positive, for an unknown name.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    out = out.absolute()
    pieces = agenda(out)
    for name in only or ():
        if name not in {p.name for p in pieces}:
            raise ValueError(f"there is no piece {name!r}; --list names them")
    pieces = [p for p in pieces if only is None or p.name in only]
    here = {"code": code_digest()}
    if torch.cuda.is_available():
        here["device"] = torch.cuda.get_device_name()
    elif not show:
        raise ValueError("torch sees no CUDA device here, and every piece needs one; --list works")
    if show:
        print(table(pieces, read_state(out), here))
        return 0
    if absent := [name for name in PARITY_NEEDS if find_spec(name) is None]:
        raise ValueError(
            f"{', '.join(absent)} cannot be imported, and no parity shown without; install "
            "fastsam[bench,test]"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the piece too
    return run(pieces, out, here, minutes, again=only is not None)
