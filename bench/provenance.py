"""What a number came from: the commit, the versions and the machine."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def git_hash() -> str | None:
    """Return HEAD's hash, with '-dirty' when tracked files differ. Outside a git checkout, of files
    that were copied out of one: what GIT_HASH says, else None."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_HASH")


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def stamp(device: str, git: str | None) -> dict[str, Any]:
    """Return versions, git hash, UTC time, and the name of the device that a run used.

    git: `git_hash()` from when the run started; the checkout may have moved on since.
    """
    import fastsam

    packages = ("torch", "torchvision", "triton", "numpy")
    on_cuda = torch.device(device).type == "cuda"
    return {
        "versions": {
            "python": platform.python_version(),
            "fastsam": fastsam.__version__,
            **{name: package_version(name) for name in packages},
        },
        "git": git,
        "device": torch.cuda.get_device_name(device) if on_cuda else f"cpu: {cpu_name()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
