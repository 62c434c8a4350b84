"""Runs prepared_launches.py: this process may have the interpreter, which launches nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")


def test_prepared_launches_hand_over_what_ordinary_ones_do():
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider",
         "-p", "no:xdist", Path(__file__).with_name("prepared_launches.py")],
        cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
