"""A finished run's summary: accuracy of the last and of the best checkpoint, cost, provenance."""

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.data.datasets import judges_of
from bench.evaluation.evaluate import evaluate
from bench.files import alone_in, write_json
from bench.provenance import git_hash, stamp
from bench.reports.rows import read_summary
from bench.settings.config import Config, differences
from bench.settings.evaluation import Evaluation, check_judges
from bench.training import processes
from bench.training.checkpoint import changed_data, load_checkpoint, rebuild
from bench.training.session import Sitting
from bench.training.tracking import has_all, track_finished
from bench.training.train import Run, data_of, train


def finished(
    config: Config, evaluation: Evaluation, out: Path, file: str = "summary.json"
) -> dict[str, Any] | None:
    """Return the summary in `out` if it is of this config and evaluation, else None."""
    path = out / file
    if not path.exists():
        return None
    summary = read_summary(path)
    usual = asdict(Evaluation(linf=(), l2=()))  # what an older summary does not say
    wanted = json.loads(json.dumps([usual | summary["evaluation"], asdict(evaluation)]))
    same = wanted[0] == wanted[1]
    return summary if same and not differences(summary["config"], config) else None


def refuse_changed_data(
    config: Config, summary: dict[str, Any], out: Path, download: bool = False
) -> None:
    """Raise ValueError for a finished run of other images than the data, or the directory that it
    was evaluated on, holds now."""
    data, name = data_of(config, download), summary["evaluation"].get("data")
    parts, of = changed_data(summary, data), config.data
    if not parts and name is not None and "judged_fingerprint" in summary:
        _, judged = judges_of(data, name, "test", config.image_size)
        parts, of = "test" * (judged != summary["judged_fingerprint"]), name
    if parts:
        raise ValueError(
            f"the {parts} images of {of!r} changed since {str(out)!r} was finished; "
            "restore them or choose another --out"
        )


def track_found(
    tracker: str | None, config: Config, out: Path, summaries: dict[str, dict[str, Any]]
) -> None:
    """As track_finished, of a run that no process need be at work on."""
    if tracker is None or has_all(tracker, config, out, summaries):
        return
    try:
        with alone_in(out, wait=True):
            track_finished(tracker, config, out, summaries)
    except OSError as e:
        warnings.warn(f"{tracker} has not got all of {str(out)!r} ({e})", stacklevel=2)


def speed(run: Run) -> float:
    """Return the images that a run trains with in a second. Each phase counts by its median epoch,
    so that a moment's interference does not count: late SAM's first epochs are SGD's, and those
    without AWP are before those with it."""
    seconds, config = [row["seconds"] for row in run.history], run.config
    starts = sorted({0, config.late_epoch, config.awp_warmup})
    phases = [seconds[begin:end] for begin, end in pairwise([*starts, config.epochs])]
    typical = sum(len(phase) * median(phase) for phase in phases if phase)
    return len(run.data.train) * len(seconds) / typical


def summarise(
    run: Run, evaluation: Evaluation, out: Path, git: str | None, bar: bool = False
) -> dict[str, Any]:
    """Evaluate last.pt and best.pt of a finished run, once if they are equal.

    git and the machine are those of the evaluation; "trained" has those of the training.
    """
    device = str(run.device)
    images, judged = judges_of(run.data, evaluation.data, evaluation.on, run.config.image_size)
    images = images.to(run.device)
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
        results[name] = evaluate(model, images, evaluation, bar=bar)
    last = results["last"]
    return {
        "method": run.config.method,
        "natural": last["natural"],
        "robust": last["robust"],
        "best": {"epoch": best_epoch,
                 **{k: results["best"][k] for k in ("natural", "robust", "warnings")}},
        "images_per_second": speed(run),
        "train_seconds": sum(row["seconds"] for row in run.history),
        "train_images": len(run.data.train),
        "wrong_labels": run.data.wrong_labels,
        "fingerprint": run.data.fingerprint,
        "test_fingerprint": run.data.test_fingerprint,
        "judged_fingerprint": judged,
        "test_images": last["images"],
        **{k: last[k] for k in ("of", "attacks", "warnings")},
        "config": asdict(run.config),
        "trained": run.trained,
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
    file: str = "summary.json",
    bar: bool = False,
) -> dict[str, Any]:
    """Return the summary of a run, training and evaluating what of it is not yet in `out`.

    file: where it is kept there, so that one run can have several evaluations.
    bar: show the evaluation's progress on stderr.
    What the sitting's tracker lacks of a finished run is tracked, too. Of several processes the
    first alone evaluates; the others return {}. Raises Stopped where `sitting` ends before the
    training does, Diverged, and Busy where another process trains in `out`.
    """
    check_judges(evaluation, config.val)
    tracker, first = sitting.track if sitting else None, processes.rank() == 0

    def found() -> dict[str, Any] | None:
        summary = finished(config, evaluation, out, file)
        for _ in range(config.epochs if summary else 0):
            after_epoch({})
        return summary

    if (summary := found()) is not None:
        if first:
            track_found(tracker, config, out, {file: summary})
        return summary
    git = git_hash()
    with alone_in(out) if first else nullcontext():
        if processes.processes() == 1 and (summary := found()) is not None:
            return summary  # another process made it meanwhile
        run = train(config, out, download, after_epoch, sitting)
        if not first:
            return {}
        summary = summarise(run, evaluation, out, git, bar)
        write_json(out / file, summary)
        track_finished(tracker, config, out, {file: summary})
    return summary
