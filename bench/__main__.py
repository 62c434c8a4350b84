"""python -m bench COMMAND: the command line, in a checkout. It parses and dispatches."""

import codecs
import io
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from bench.cli import catalogue, evaluation, experiments, options, reports, speed, training
from bench.cli.parse import Command, parse
from bench.files import refuse_unwritable
from bench.training.diverged import DIVERGED, Diverged
from bench.training.stopped import TERMINATED, Stopped, Terminated

COMMANDS = {
    command.name: command
    for family in (training, experiments, evaluation, catalogue, options, speed, reports)
    for command in family.COMMANDS
}
SPELT = {"\N{PLUS-MINUS SIGN} ": "+-"}  # as wide, so that columns stay even
WRITTEN = ("rows", "robustbench", "figure")  # files at the end of long work
PIPE_CLOSED, INTERRUPTED = 128 + signal.SIGPIPE, 128 + signal.SIGINT  # as shells have it


def open_closed_output() -> None:
    """Let output that is closed from the start, as by >&-, go nowhere: without it Python has no
    stdout, and a checkpoint could be opened in its place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def spelt(error: UnicodeError) -> tuple[str | bytes, int]:
    """For codecs: what is printed of a sign that the output's encoding has not. The bytes of a
    path that is no text are printed as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":
        return sign.encode("latin-1", "surrogateescape"), error.start + 1
    pair = error.object[error.start : error.start + 2]
    if pair in SPELT:
        return SPELT[pair], error.start + 2
    return sign.encode("ascii", "backslashreplace").decode(), error.start + 1


def print_in_any_encoding() -> None:
    """Let tables be printed where stdout's encoding is ASCII, or another without their signs."""
    codecs.register_error("spelt", spelt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="spelt")


def parsed(words: list[str]) -> tuple[Command, dict[str, Any]]:
    try:
        return parse(COMMANDS, words)
    finally:
        sys.stdout.flush()  # --help, which ends the program, is output too


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 when a benchmark's parity check is red, 2 after one sentence about
    the input that cannot be used or the package that is not there, DIVERGED (3) after one about the
    training that did, 143 after SIGTERM, 130 after Ctrl-C, or 141 where nobody reads the output."""

    open_closed_output()
    print_in_any_encoding()
    try:
        command, given = parsed(sys.argv[1:] if argv is None else argv)
        if "TORCHELASTIC_RUN_ID" in os.environ and command.name != "train":
            raise ValueError(f"torchrun is for train alone; start {command.name} without it")
        for name in WRITTEN:
            refuse_unwritable(given.get(name))
        code = command.run(given) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as `| head` leaves it: nobody reads on
        with suppress(OSError):  # what Python would flush at its end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] in ("", "bench", "fastsam"):
            raise
        print(f"error: {e}, which the benchmark needs; pip install '.[demo]' in the checkout, and "
              "repeat the command: what was finished stays", file=sys.stderr)  # fmt: skip
        return 2
    except Diverged as e:
        print(f"error: {e}", file=sys.stderr)
        return DIVERGED
    except KeyboardInterrupt:
        print("interrupted; repeat the command to go on from the last checkpoint, if it trains",
              file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    except Stopped as where:
        print(f"stopped {where}; repeat the command to go on")
        return TERMINATED if isinstance(where, Terminated) else 0


if __name__ == "__main__":
    sys.exit(main())
