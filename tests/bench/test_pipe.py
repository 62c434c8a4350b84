"""Output that nobody reads, from the start or from some line on, ends every command in silence."""

import fcntl
import os
import shlex
import subprocess
import sys
import threading

import pytest

from bench.__main__ import main
from bench.provenance import ROOT
from bench.reports import runs
from bench.training.checkpoint import load_checkpoint

from ..helpers.survive import SMALL

RESULTS = ROOT / "bench" / "results"
TINY = [*SMALL, "--epochs", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipe") / "sgd-seed0"
    assert main(["train", *TINY, "--out", str(out)]) == 0
    return out


def run_with(reader, arguments, monkeypatch):
    """Return the exit code of a command whose output a pipe of one page takes. reader: gets the end
    to read from."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    other = threading.Thread(target=reader, args=(read,))
    other.start()
    with os.fdopen(write, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        try:
            return main(arguments)
        except SystemExit as end:  # argparse's
            return end.code
        finally:
            other.join(10)


def nobody(read):
    os.close(read)


def leaves_at_once(read):
    assert os.read(read, 1)
    os.close(read)


COMMANDS = {
    "help": ["--help"],
    "train help": ["train", "--help"],
    "recipes": ["recipes"],
    "train": ["train", *TINY, "--out", "RUN"],
    "compare": ["compare", *TINY, "--methods", "sgd", "--seeds", "0", "--out", "ABOVE"],
    "sweep": ["sweep", *TINY, "--methods", "sgd", "--seeds", "0", "--out", "ABOVE"],
    "evaluate": ["evaluate", "RUN/last.pt", "--attacks", "clean"],
    "export": ["export", "RUN", "OUT"],
    "report": ["report", str(RESULTS / "cifar6k.jsonl"), "--out", "OUT"],
    "step report": ["report", "--step", str(RESULTS / "step-first.jsonl"), "--out", "OUT"],
    "study": ["study", "rho", "--show", str(RESULTS / "study-rho.jsonl")],
    "step": ["step", "--params", "1000", "--tensors", "2", "--methods", "sgd", "--reps", "1"],
    "theory": ["theory", "--n", "5", "--out", "OUT"],
    "gpu": ["gpu", "--list", "--out", "OUT"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_pipe_ends_every_command_in_silence(name, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "draw", lambda *given: {})
    places = {"RUN": str(trained), "ABOVE": str(trained.parent), "OUT": str(tmp_path / "out")}
    arguments = [a.replace(a.split("/")[0], places.get(a.split("/")[0], a.split("/")[0]), 1)
                 for a in COMMANDS[name]]  # fmt: skip
    assert run_with(nobody, arguments, monkeypatch) == 141
    assert capsys.readouterr().err.replace("\r", "").strip() == ""


@pytest.mark.parametrize("arguments", [
    ["report", str(RESULTS / "study-noise.jsonl")], ["recipes"], ["train", "--help"]
], ids=lambda arguments: arguments[0])  # fmt: skip
def test_a_reader_who_leaves_in_mid_report(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "draw", lambda *given: {})
    more = ["--out", str(tmp_path / "out")] if arguments[0] == "report" else []
    assert run_with(leaves_at_once, arguments + more, monkeypatch) == 141
    assert capsys.readouterr().err == ""
    if more:
        assert (tmp_path / "out" / "report.html").exists()


def test_output_that_is_closed_from_the_start_ends_nothing(trained):
    words = [sys.executable, "-m", "bench", "train", *TINY, "--out", str(trained)]
    done = subprocess.run(f"{shlex.join(words)} >&- 2>&-", shell=True, cwd=ROOT)
    assert done.returncode == 0
    assert load_checkpoint(trained / "last.pt")
