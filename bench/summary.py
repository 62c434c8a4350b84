"""A finished run's summary: accuracy of the last and of the best checkpoint, cost, provenance."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import parallel
from bench.checkpoint import load_checkpoint, rebuild
from bench.config import Config, Evaluation, differences
from bench.evaluate import evaluate
from bench.record import alone_in, git_hash, stamp, write_json
from bench.sitting import Sitting
from bench.train import Run, train


def finished(config: Config, evaluation: Evaluation, out: Path) -> dict[str, Any] | None:
    """Return the summary in `out` if it is of this config and evaluation, else None."""
    path = out / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    same = summary["evaluation"] == json.loads(json.dumps(asdict(evaluation)))
    return summary if same and not differences(summary["config"], config) else None


def summarise(
    run: Run, evaluation: Evaluation, out: Path, git: str | None, bar: bool = False
) -> dict[str, Any]:
    """Evaluate last.pt and best.pt of a finished run on the test set, once if they are equal.

    images_per_second is the median epoch's, so that a moment's interference does not count.
    """
    device = str(run.device)
    test = run.data.test.to(run.device)
    best_epoch = load_checkpoint(out / "best.pt", device)["epoch"]
    results = {}
    for name in ("last", "best"):
        if name == "best" and best_epoch == run.config.epochs - 1:
            results[name] = results["last"]
            continue
        path = out / f"{name}.pt"
        model = rebuild(load_checkpoint(path, device), path, device)
        if run.config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        results[name] = evaluate(model, test, evaluation, bar=bar)
    last = results["last"]
    return {
        "method": run.config.method,
        "natural": last["natural"],
        "robust": last["robust"],
        "best": {**{k: results["best"][k] for k in ("natural", "robust")}, "epoch": best_epoch},
        "images_per_second": median(row["images_per_second"] for row in run.history),
        "train_seconds": sum(row["seconds"] for row in run.history),
        "train_images": len(run.data.train),
        "wrong_labels": run.data.wrong_labels,
        "test_images": last["images"],
        **{k: last[k] for k in ("of", "attacks", "warnings")},
        "config": asdict(run.config),
        "evaluation": asdict(evaluation),
        **stamp(device, git),
    }


def train_and_evaluate(
    config: Config,
    evaluation: Evaluation,
    out: Path,
    download: bool = False,
    after_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    sitting: Sitting | None = None,
    bar: bool = False,
) -> dict[str, Any]:
    """Return the summary of a run, training and evaluating what of it is not yet in `out`.

    bar: show the evaluation's progress on stderr. Of several processes the first alone evaluates;
    the others return {}. Raises Stopped where `sitting` ends before the training does, Diverged,
    and ValueError where another process trains in `out`.
    """
    if (summary := finished(config, evaluation, out)) is not None:
        for _ in range(config.epochs):
            after_epoch({})
        return summary
    git, first = git_hash(), parallel.rank() == 0
    with alone_in(out) if first else nullcontext():
        run = train(config, out, download, after_epoch, sitting)
        if not first:
            return {}
        summary = summarise(run, evaluation, out, git, bar)
        write_json(out / "summary.json", summary)
    return summary
