"""Several seeds of one setting as one row: means, and sample deviations."""

import statistics
from typing import Any


def spread(values: list[float]) -> float:
    """Return the sample standard deviation, 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def warned(label: str, row: dict[str, Any]) -> list[str]:
    """Return what the evaluations of an `aggregate` warned of: a sentence once, with its seeds."""
    return [
        f"Warning: {label}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {text}."
        for text, seeds in row["warnings"].items()
    ]


def seeds_by_warning(summaries: list[dict[str, Any]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for summary in summaries:
        for text in summary.get("warnings", []):
            found.setdefault(text, []).append(summary["config"]["seed"])
    return found


def aggregate(method: str, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a method's object for summary.json: means over seeds, and sample deviations."""
    robust: dict[str, dict[str, dict[str, float]]] = {"mean": {}, "std": {}}
    for norm, by_eps in summaries[0]["robust"].items():
        for eps in by_eps:
            values = [s["robust"][norm][eps] for s in summaries]
            robust["mean"].setdefault(norm, {})[eps] = statistics.fmean(values)
            robust["std"].setdefault(norm, {})[eps] = spread(values)
    natural = [s["natural"] for s in summaries]
    speeds = [s["images_per_second"] for s in summaries]
    first = summaries[0]
    return {
        "method": method,
        "natural": statistics.fmean(natural),
        "natural_std": spread(natural),
        "robust": robust["mean"],
        "robust_std": robust["std"],
        "images_per_second": statistics.fmean(speeds),
        "images_per_second_std": spread(speeds),
        "warnings": seeds_by_warning(summaries),
        "seeds": [s["config"]["seed"] for s in summaries],
        "runs": [f"{method}-seed{s['config']['seed']}" for s in summaries],
        **{k: first[k] for k in ("config", "evaluation", "attacks", "test_images")},
        **{k: first[k] for k in ("versions", "git", "device")},
    }
