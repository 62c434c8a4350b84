"""Runs day_one.py: this process may have the interpreter, and keeps its driver."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.mark.skipif(shutil.which("cc") is None, reason="the pretended libcuda is in C")
def test_where_triton_cannot_work_something_else_does():
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider",
         "-p", "no:xdist", Path(__file__).with_name("day_one.py")],
        cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
