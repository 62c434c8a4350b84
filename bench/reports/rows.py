"""A row of a finished run: what every summary.json and every line of --rows has."""

from pathlib import Path
from typing import Any

from bench.files import read_json

NEEDED = (
    "method", "natural", "robust", "best", "images_per_second", "train_seconds", "test_images",
    "attacks", "config", "evaluation", "versions", "git", "device",
)  # fmt: skip


def read_summary(path: Path) -> dict[str, Any]:
    """Return a run's summary. Raises ValueError with the path of a damaged one."""
    remedy = "remove it and repeat the run's command, which then evaluates its checkpoints again"
    summary = read_json(path, remedy)
    known = summary if isinstance(summary, dict) else {}
    if missing := [key for key in NEEDED if key not in known]:
        raise ValueError(f"{str(path)!r} is no row of a run: no {missing[0]}; {remedy}")
    return summary
