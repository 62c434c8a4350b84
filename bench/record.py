"""What a run leaves behind: atomic files, and the stamp of the machine and versions behind them."""

import errno
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends, and never exists half."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a directory if need be, and keep it from other processes that ask, until the block ends
    or this process does, however that happens. Raises ValueError where another one keeps it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        if fcntl is not None:
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers inherit it
            except OSError as e:
                if e.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
                    raise ValueError(
                        f"another process is at work in {str(folder)!r}; wait for its end, or "
                        "choose another --out"
                    ) from e
        yield


def remove_unfinished(folder: Path) -> None:
    """Remove what `replacing` left behind in a directory when it was killed."""
    for tmp in folder.glob(".*.tmp"):
        tmp.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as tmp:
        tmp.write_text(text)


def finite(value: Any) -> Any:
    """Return `value` with null in the place of every number that is not finite."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {k: finite(v) for k, v in value.items()}
        case list() | tuple():
            return [finite(v) for v in value]
    return value


def strict_json(value: Any, indent: int | None = None) -> str:
    """Return JSON that every parser reads: NaN and inf, which it does not know, are null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, strict_json(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(strict_json(row) + "\n" for row in rows))


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append to a JSONL file the rows that it does not hold yet; a crash leaves the old file."""
    old = path.read_text().splitlines() if path.exists() else []
    new = [line for line in map(strict_json, rows) if line not in old]
    write_text(path, "".join(line + "\n" for line in old + new))


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
