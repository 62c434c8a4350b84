"""Files that are written whole or not at all, by one process at a time, and read with a remedy."""

import errno
import glob
import json
import math
import os
import platform
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Busy(ValueError):
    """Another process is at work in a directory."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends, and never exists half.

    Raises OSError with the path where the disk is full, read-only or gone; the old file stays.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    refuse_no_file(path)
    try:
        with beside(path) as tmp:
            yield tmp
            with open(tmp, "rb") as f:
                os.fsync(f.fileno())
            os.replace(tmp, path)
    except OSError as e:
        raise OSError(
            f"cannot write {str(path)!r} ({e.strerror or e}); make room or choose another place, "
            "and repeat the command: what was finished stays"
        ) from e


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a new file in the same directory, which `remove_unfinished` leaves alone until the
    block ends or this process does."""
    while True:
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with open(tmp, "xb") as f:
            try:
                lock(f, "flock", wait=True)
                if tmp.exists():  # else removed between the two lines before
                    yield tmp
                    return
            finally:
                with suppress(OSError):
                    tmp.unlink(missing_ok=True)


def lock(file: IO, call: str, wait: bool) -> bool:
    """Keep an open file from others until it is closed or this process ends, however that happens;
    return False where another one keeps it and `wait` is false.

    call: "lockf", which the processes that read images do not inherit, or "flock", which keeps
    threads of one process apart, too.
    """
    if fcntl is None:
        return True
    try:
        getattr(fcntl, call)(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # no locks there
            raise
    return True


@contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Make a directory if need be, and keep it from other processes that ask, until the block ends
    or this process does. wait: until others leave it; else raises Busy where another one keeps it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as f:
        if not lock(f, "lockf", wait):
            f.seek(0)
            raise Busy(
                f"another process is at work in {str(folder)!r} ({f.read()}); wait for its end, or "
                "choose another --out"
            )
        with suppress(OSError):  # a full disk; the name is for people alone
            os.ftruncate(f.fileno(), 0)
            os.write(f.fileno(), f"{platform.node()}, process {os.getpid()}".encode())
        yield


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Keep a file, made if need be, from other processes that ask, even where it is replaced."""
    while True:
        with open(path, "a") as f:
            lock(f, "flock", wait=True)
            if path.exists() and os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                yield
                return


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what `replacing` left behind of a file, or of all in a directory, when it was killed,
    and nothing that another process is writing."""
    for tmp in folder.glob(f".{name}.tmp"):
        with suppress(FileNotFoundError), open(tmp, "r+b") as f:
            if lock(f, "flock", wait=False):
                tmp.unlink()


def refuse_no_file(path: Path) -> None:
    """Raise OSError for a directory, and for a device or a pipe, in whose place a file would be."""
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; give the name of a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{str(path)!r} is no file, but a device or a pipe; give the name of "
                              "a file")  # fmt: skip


def refuse_unwritable(path: Path | None) -> None:
    """Raise OSError where a file could not be written at the end of long work."""
    if path is None:
        return
    refuse_no_file(path)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise PermissionError(f"{str(path)!r} cannot be written; choose another place")


def read_json(path: Path, remedy: str) -> Any:
    """Return what a JSON file holds. Raises ValueError with the path; remedy: what to do then."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as e:  # no JSON, or no text
        raise ValueError(f"{str(path)!r} is damaged ({e}); {remedy}") from e


def row_of(text: str, where: str, needed: Iterable[str], of: str) -> dict[str, Any]:
    """Return the row that a line of JSONL holds. Raises ValueError, with `where` it stands, for one
    that is no row `of` what it should be, which has all that is needed."""
    try:
        row = json.loads(text)
        missing = [key for key in needed if key not in row]
    except (json.JSONDecodeError, TypeError):
        missing = ["JSON object"]
    if missing:
        raise ValueError(f"{where} is no row of a {of}: no {missing[0]}; remove the line, or give "
                         "another file")  # fmt: skip
    return row


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


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
    """Append to a JSONL file, in folders that need not be there, the rows that it does not hold
    yet; a crash leaves the old file, and processes that append at once wait for each other. Raises
    ValueError for a file of no text."""
    path = Path(os.path.realpath(path))
    refuse_no_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with kept(path):
        remove_unfinished(path.parent, f"{glob.escape(path.name)}.*")
        try:
            old = path.read_text("utf-8").split("\n")
        except UnicodeDecodeError as e:
            raise ValueError(f"{str(path)!r} is no JSONL ({e}); give another file") from e
        old = [line for line in old if line.strip()]
        new = [line for line in map(strict_json, rows) if line not in old]
        write_text(path, "".join(line + "\n" for line in old + new))
