"""Code in a process of its own."""

import os
import subprocess
import sys


def in_a_process(code: str, **env: str) -> str:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True,
                         text=True, env={**os.environ, **env}, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout
