"""The compiled kernels, executed instruction by instruction on the CPU, for two targets.

In processes of their own: this one has told Triton to interpret. tests/helpers/ptx says what is
checked of every launch; tests/backends/executed holds what only executed code can show, and the
kernels' own tests run on it unchanged.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90")
KERNELS = ("tests/backends/test_contract.py", "tests/backends/test_kernels.py")
# of the kernels' own tests, those that meet every kernel, type and path, dealt out to the targets;
# `make prove` runs all of them on both
SOME = {"sm_80": "adam_and_adamw or (masters_of_16 and fasam) or several_blocks",
        "sm_90": "every_method or misaligned_gradients"}


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.helpers.ptx.plugin", "-p", "no:xdist", "-q",
         "-p", "no:cacheprovider", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={k: x for k, x in os.environ.items() if not k.startswith("PYTEST")})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


def test_executed_code():
    run("--target", "sm_90", "tests/backends/executed")


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_executed(target):
    run("--target", target, *KERNELS, "-k", f"({SOME[target]}) and not numba")


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_all_executed_code(target):
    """With drawn sequences over the whole optimizer."""
    run("--target", target, "-m", "long or not long", "tests/backends/executed")


@pytest.mark.long
@pytest.mark.parametrize("schedule", [(), ("--alone",)], ids=["together", "alone"])
@pytest.mark.parametrize("target", TARGETS)
def test_all_kernel_tests_executed(target, schedule):
    # but that a CPU is refused, which the executor takes
    run("--target", target, *schedule, *KERNELS, "tests/backends/test_pgd_kernels.py",
        "-k", "not numba and not without_the_interpreter")
