"""Train and attack several methods over several seeds; one summary, one table, two plots."""

import multiprocessing
import os
import statistics
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.attacks import eps_key
from bench.battery import IN_BF16
from bench.config import Config, Evaluation
from bench.diverged import Diverged
from bench.evaluate import NORM_NAMES
from bench.objectives import TEXT
from bench.record import append_jsonl, write_json, write_text
from bench.summary import finished, train_and_evaluate
from bench.tables import markdown
from bench.train import refuse_early

_epochs_done: Any = None


def start_worker(epochs_done: Any) -> None:
    """Give a worker the epoch counter, and end it with its parent: an orphan would go on writing
    into directories that the next, resuming comparison writes too."""
    global _epochs_done
    _epochs_done = epochs_done

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def work(config: Config, evaluation: Evaluation, out: Path) -> dict[str, Any]:
    def count(row: dict[str, Any]) -> None:
        with _epochs_done.get_lock():
            _epochs_done.value += 1

    return train_and_evaluate(config, evaluation, out, after_epoch=count)


def run_all(
    runs: dict[str, Config], evaluation: Evaluation, out: Path, jobs: int, download: bool = False
) -> list[dict[str, Any]]:
    """Return every run's summary, in the runs' order.

    runs: by their directories' names in `out`. Finished ones there are not repeated, interrupted
    ones continue. jobs: runs at a time. Raises ValueError for what set_up and load_state refuse,
    before anything is written.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    summaries = {name: finished(config, evaluation, out / name) for name, config in runs.items()}
    left = {name: runs[name] for name, summary in summaries.items() if summary is None}
    for name, config in left.items():
        refuse_early(config, out / name, download)
    if left:
        summaries |= make(left, evaluation, out, jobs)
    return list(summaries.values())


def make(
    runs: dict[str, Config], evaluation: Evaluation, out: Path, jobs: int
) -> dict[str, dict[str, Any]]:
    """Train and evaluate, `jobs` runs at a time; return the summaries by the runs' names.

    Raises Diverged for those that do, after all the others are made.
    """
    context = multiprocessing.get_context("spawn")
    epochs_done = context.Value("q", 0)
    total = sum(config.epochs for config in runs.values())
    with (
        ProcessPoolExecutor(jobs, context, start_worker, (epochs_done,)) as pool,
        tqdm(total=total, unit="epoch", desc=f"{len(runs)} runs", smoothing=0.02) as bar,
    ):
        futures = {
            pool.submit(work, config, evaluation, out / name): name for name, config in runs.items()
        }
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(epochs_done.value - bar.n)
            for future in done:
                if isinstance(future.exception(), Diverged):
                    bar.write(f"{futures[future]}: {future.exception()}")
                    continue
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                summary = future.result()
                bar.write(f"{futures[future]}: {one_line(summary)}")
    if diverged := [name for f, name in futures.items() if isinstance(f.exception(), Diverged)]:
        raise Diverged(
            f"{len(diverged)} of {len(runs)} runs diverged ({', '.join(diverged)}); the others are "
            f"made and stay in {str(out)!r}: lower lr, or repeat the command without these"
        )
    return {name: future.result() for future, name in futures.items()}


def one_line(summary: dict[str, Any]) -> str:
    robust = summary["robust"]["linf"]
    at = ", ".join(f"{accuracy:.1%} at l_inf {eps}" for eps, accuracy in robust.items())
    return (
        f"natural {summary['natural']:.1%}, {at}, "
        f"{summary['images_per_second']:.0f} images/s in training"
    )


def spread(values: list[float]) -> float:
    """Return the sample standard deviation, 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def aggregate(method: str, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a method's object for summary.json: means over seeds, and sample deviations."""
    robust = {"mean": {}, "std": {}}
    for norm, by_eps in summaries[0]["robust"].items():
        for eps in by_eps:
            values = [s["robust"][norm][eps] for s in summaries]
            robust["mean"].setdefault(norm, {})[eps] = statistics.fmean(values)
            robust["std"].setdefault(norm, {})[eps] = spread(values)
    natural = [s["natural"] for s in summaries]
    first = summaries[0]
    return {
        "method": method,
        "natural": statistics.fmean(natural),
        "natural_std": spread(natural),
        "robust": robust["mean"],
        "robust_std": robust["std"],
        "images_per_second": statistics.fmean(s["images_per_second"] for s in summaries),
        "seeds": [s["config"]["seed"] for s in summaries],
        "runs": [f"{method}-seed{s['config']['seed']}" for s in summaries],
        **{k: first[k] for k in ("config", "evaluation", "attacks", "test_images")},
        **{k: first[k] for k in ("versions", "git", "device")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table; accuracies in %, mean ± std over the seeds."""
    columns = [(norm, eps) for norm, by_eps in rows[0]["robust"].items() for eps in by_eps]
    names = [f"{NORM_NAMES[norm]} {eps}" for norm, eps in columns]
    head = ["method", "natural", *names, "images/s", "cost"]
    several = len(rows[0]["seeds"]) > 1

    def cell(mean: float, std: float) -> str:
        return f"{100 * mean:.1f} ± {100 * std:.1f}" if several else f"{100 * mean:.1f}"

    lines = []
    for row in rows:
        accuracies = [cell(row["natural"], row["natural_std"])]
        accuracies += [cell(row["robust"][n][e], row["robust_std"][n][e]) for n, e in columns]
        cost = [f"{row['images_per_second']:.0f}", f"{row['relative_cost']:.1f}x"]
        lines.append([row["method"], *accuracies, *cost])
    return markdown(head, lines, left=1)


def settings(config: dict[str, Any]) -> str:
    """Return what one method was trained with and the others were not."""
    names = ("rho", "sigma", "lmbda", "scale", "eps", "alpha", "attack_steps", "beta")
    own = {k: config[k] for k in names if config.get(k) is not None}
    usual = {"base": "sgd", "interval": 1, "late": 0.0, "ascent_part": 1.0, "micro": 1}
    usual |= {"awp_gamma": 0.0, "label_noise": 0.0}
    own |= {k: config[k] for k, value in usual.items() if config.get(k, value) != value}
    own |= {k: eps_key(own[k]) for k in ("eps", "alpha") if k in own}
    return ", ".join(f"{k} {v}" for k, v in own.items())


def caption(rows: list[dict[str, Any]]) -> str:
    """Return what the table's numbers are: data, model, attacks, seeds, device."""
    config, evaluation = rows[0]["config"], rows[0]["evaluation"]
    trained = "; ".join(f"{row['method']} {settings(row['config'])}".strip() for row in rows)
    radii = {norm: [eps_key(e) for e in evaluation[norm]] for norm in NORM_NAMES}
    passes = IN_BF16 if evaluation.get("precision") == "bf16" else ""
    return (
        f"Test accuracy in % on {rows[0]['test_images']} images of {config['data']}, "
        f"{config['model']} of width {config['width']}, {config['epochs']} epochs, last "
        f"checkpoint, seeds {', '.join(map(str, rows[0]['seeds']))}; {rows[0]['device']}.\n"
        f"Methods: {trained}.\n"
        f"Attacks: PGD-{evaluation['steps']}, random start, 1 restart, {TEXT}{passes}; "
        "model.eval(), images in [0, 1]; "
        f"l_inf {', '.join(radii['linf'])} with alpha eps/4, l2 {', '.join(radii['l2'])} "
        "with alpha eps/8.\nCost: training time per image, relative to the cheapest method."
    )


def write_outputs(rows: list[dict[str, Any]], out: Path) -> list[Path]:
    """Write summary.json, table.md and the two plots; return their paths."""
    from bench.plots import plot_cost, plot_eps

    fastest = max(row["images_per_second"] for row in rows)
    for row in rows:
        row["relative_cost"] = fastest / row["images_per_second"]
    names = ("summary.json", "table.md", "accuracy-eps.png", "accuracy-cost.png")
    paths = [out / name for name in names]
    write_json(paths[0], rows)
    write_text(paths[1], f"{table(rows)}\n\n{caption(rows)}\n")
    plot_eps(rows, paths[2])
    plot_cost(rows, paths[3])
    return paths


def append_rows(path: Path | None, summaries: list[dict[str, Any]]) -> list[Path]:
    """Append the rows that the file does not hold yet; return the paths written."""
    if path is None:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    append_jsonl(path, summaries)
    return [path]


def compare(
    by_seed: list[list[Config]],
    evaluation: Evaluation,
    out: Path,
    jobs: int = 1,
    rows_path: Path | None = None,
    download: bool = False,
) -> list[dict[str, Any]]:
    """Run every method of the first seed, then of the next; write, print and return the result.

    by_seed: one list of configs a seed. rows_path: a JSONL file to append one row a run to. The
    rest is as in run_all.
    """
    runs = {config.name: config for of_seed in by_seed for config in of_seed}
    summaries = run_all(runs, evaluation, out, jobs, download)
    methods = [config.method for config in by_seed[0]]
    rows = [aggregate(m, [s for s in summaries if s["method"] == m]) for m in methods]
    paths = write_outputs(rows, out)
    paths += append_rows(rows_path, summaries)
    print(f"\n{table(rows)}\n\n{caption(rows)}\n")
    print("\n".join(f"wrote {path}" for path in paths))
    return rows
