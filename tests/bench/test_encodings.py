"""Output in an encoding that has not all signs, such as ASCII or Windows' cp1252."""

import io
import os
import subprocess
import sys

import pytest

from bench.__main__ import main
from bench.provenance import ROOT
from bench.reports import runs

RESULTS = ROOT / "bench" / "results"
COMMANDS = {
    "help": ["train", "--help"],
    "report": ["report", str(RESULTS / "cifar6k.jsonl"), "--out", "OUT"],
    "step report": ["report", "--step", str(RESULTS / "step-first.jsonl"), "--out", "OUT"],
    "study": ["study", "rho", "--show", str(RESULTS / "study-rho.jsonl")],
    "claims": ["study", "cifar", "--show", str(RESULTS / "study-cifar.jsonl")],
    "recipes": ["recipes"],
    "options": ["options"],
    "theory": ["theory", "--n", "5", "--out", "OUT"],
}


def printed(arguments, encoding, monkeypatch, errors="strict"):
    """Return the bytes that a command prints."""
    with monkeypatch.context() as patch:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding, errors)
        patch.setattr(sys, "stdout", stdout)
        try:
            assert main(arguments) == 0
        except SystemExit as end:  # argparse's
            assert not end.code
        stdout.flush()
        return stdout.buffer.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_table_is_printed(name, encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "draw", lambda *given: {})
    arguments = [str(tmp_path / "\u2192 out") if a == "OUT" else a for a in COMMANDS[name]]
    text = printed(arguments, encoding, monkeypatch).decode(encoding)
    if "OUT" in COMMANDS[name]:
        assert "\\u2192 out" in text
    if name in ("report", "study", "claims"):
        assert {"ascii": " +-", "cp1252": " \xb1 "}[encoding] in text
    if name in ("study", "claims"):
        for part in text.split("\n\n"):
            widths = {len(line) for line in part.splitlines() if line.startswith("|")}
            assert len(widths) <= 1, part


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_path_that_is_no_text_is_printed_as_it_is(encoding, errors, tmp_path, monkeypatch):
    out = os.fsdecode(os.fsencode(tmp_path / "out") + b"\xe9")
    said = printed(["theory", "--n", "5", "--out", out], encoding, monkeypatch, errors)
    assert b"out\xe9/" in said


def test_files_are_utf_8_where_the_locale_is_not(tmp_path):
    """As on Windows; a page says that it is UTF-8."""
    words = [sys.executable, "-m", "bench", "study", "rho", "--show",
             str(RESULTS / "study-rho.jsonl")]  # fmt: skip
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | plain, capture_output=True)
    assert done.returncode == 0 and b" +-" in done.stdout
    program = ("from pathlib import Path; from bench.files import write_text; "
               "write_text(Path('signs'), '\\xb1')")  # fmt: skip
    env = os.environ | plain | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "signs").read_bytes() == "\xb1".encode()
