"""Train and attack several methods over several seeds; one summary, one table, two plots."""

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.attacks.by_name import IN_BF16
from bench.attacks.notation import eps_key, in_both_forms, labelled
from bench.attacks.objectives import FIRST, LAST, in_words
from bench.evaluation.evaluate import NORM_NAMES
from bench.experiments.train_and_evaluate import finished, refuse_changed_data, train_and_evaluate
from bench.files import (
    Busy,
    alone_in,
    append_jsonl,
    refuse_unwritable,
    remove_unfinished,
    write_json,
    write_text,
)
from bench.reports.tables import markdown
from bench.settings.config import SETTINGS, Config
from bench.settings.evaluation import Evaluation
from bench.settings.names import method_name
from bench.training.diverged import Diverged
from bench.training.train import refuse_early

ASKED_AGAIN = 2.0  # seconds between looks at what another process is at work on
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
    ones continue, and those that another process makes are waited for. jobs: runs at a time.
    Raises ValueError for what set_up and load_state refuse, and for finished runs of other images,
    before anything is written.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    summaries = {name: finished(config, evaluation, out / name) for name, config in runs.items()}
    left = {name: runs[name] for name, summary in summaries.items() if summary is None}
    for name, config in left.items():
        refuse_early(config, out / name, download)
    for name, summary in summaries.items():
        if left and summary is not None:
            refuse_changed_data(runs[name], summary, out / name, download)
    if left:
        summaries |= make(left, evaluation, out, jobs)
    return list(summaries.values())


def make(
    runs: dict[str, Config], evaluation: Evaluation, out: Path, jobs: int
) -> dict[str, dict[str, Any]]:
    """Train and evaluate, `jobs` runs at a time; return the summaries by the runs' names.

    Runs that another process is at work on are left for the end, and then taken from it, or up
    where it was ended. Raises OSError where a process here is killed, and Diverged for runs that
    do, after all the others are made.
    """
    context = multiprocessing.get_context("spawn")
    epochs_done = context.Value("q", 0)
    total = sum(config.epochs for config in runs.values())
    summaries: dict[str, dict[str, Any]] = {}
    diverged: dict[str, Diverged] = {}
    said = ""
    with (
        ProcessPoolExecutor(jobs, context, start_worker, (epochs_done,)) as pool,
        tqdm(total=total, unit="epoch", desc=f"{len(runs)} runs", smoothing=0.02) as bar,
    ):
        while left := {name: runs[name] for name in runs if name not in {**summaries, **diverged}}:
            futures = {pool.submit(work, config, evaluation, out / name): name
                       for name, config in left.items()}  # fmt: skip
            for name, made in completed(futures, pool, lambda: bar.update(
                epochs_done.value - bar.n
            )):  # fmt: skip
                if isinstance(made, Diverged):
                    diverged[name] = made
                    bar.write(f"{name}: {made}")
                    continue
                summaries[name] = made
                bar.write(f"{name}: {one_line(made)}")
            if elsewhere := ", ".join(n for n in left if n not in {**summaries, **diverged}):
                if elsewhere != said:
                    bar.write(f"at work in another process, waited for: {elsewhere}")
                said = elsewhere
                time.sleep(ASKED_AGAIN)
    if diverged:
        raise Diverged(
            f"{len(diverged)} of {len(runs)} runs diverged ({', '.join(diverged)}); the others are "
            f"made and stay in {str(out)!r}: lower lr, or repeat the command without these"
        )
    return summaries


def completed(
    futures: dict[Future, str], pool: ProcessPoolExecutor, tick: Callable[[], None]
) -> Iterator[tuple[str, dict[str, Any] | Diverged]]:
    """Yield name and summary of each run as it ends, or its divergence, but of those that others
    are at work on. tick: called all the while. The first other error ends the wait, when what is
    under way has ended."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        tick()
        for future in done:
            error = future.exception()
            if error is None or isinstance(error, Diverged):
                yield futures[future], error or future.result()
            elif isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    f"a process that trained was killed (of {', '.join(futures.values())}); repeat "
                    "the command to go on, with fewer --jobs if memory was short"
                ) from error
            elif not isinstance(error, Busy):
                pool.shutdown(wait=False, cancel_futures=True)
                raise error


def one_line(summary: dict[str, Any]) -> str:
    robust = summary["robust"]["linf"]
    at = ", ".join(f"{accuracy:.1%} at l_inf {labelled(eps)}" for eps, accuracy in robust.items())
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
        "seeds": [s["config"]["seed"] for s in summaries],
        "runs": [f"{method}-seed{s['config']['seed']}" for s in summaries],
        **{k: first[k] for k in ("config", "evaluation", "attacks", "test_images")},
        **{k: first[k] for k in ("versions", "git", "device")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table; accuracies in %, mean ± std over the seeds."""
    columns = [(norm, eps) for norm, by_eps in rows[0]["robust"].items() for eps in by_eps]
    names = [f"{NORM_NAMES[norm]} {labelled(eps)}" for norm, eps in columns]
    head = ["method", "natural", *names, "images/s", "cost"]
    several = len(rows[0]["seeds"]) > 1

    def cell(mean: float, std: float) -> str:
        return f"{100 * mean:.1f} ± {100 * std:.1f}" if several else f"{100 * mean:.1f}"

    lines = []
    for row in rows:
        accuracies = [cell(row["natural"], row["natural_std"])]
        accuracies += [cell(row["robust"][n][e], row["robust_std"][n][e]) for n, e in columns]
        cost = [f"{row['images_per_second']:.0f}", f"{row['relative_cost']:.1f}x"]
        lines.append([method_name(row["method"]), *accuracies, *cost])
    return markdown(head, lines, left=1)


def settings(config: dict[str, Any], among: Sequence[dict[str, Any]] = ()) -> str:
    """Return what one method was trained with and the others were not.

    among: all methods' configs; whatever differs between them is told.
    """
    told = {k: of.value for k, of in SETTINGS.items() if of.told}
    own = {k: config[k] for k, value in told.items() if config.get(k, value) != value}
    own |= {k: config[k] for k in differing(among) if config.get(k) is not None}
    own |= {k: eps_key(own[k]) for k in ("eps", "alpha") if k in own}
    return ", ".join(f"{k} {v}" for k, v in own.items())


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the settings in which configs differ, beside the method and the seed."""
    names = dict.fromkeys(k for config in configs for k in config)
    return [k for k in names if k not in ("method", "seed", "recipe")
            and any(c.get(k) != configs[0].get(k) for c in configs)]  # fmt: skip


def caption(rows: list[dict[str, Any]]) -> str:
    """Return what the table's numbers are: data, model, attacks, seeds, device, and all settings in
    which the methods differ."""
    config, evaluation = rows[0]["config"], rows[0]["evaluation"]
    configs = [row["config"] for row in rows]
    apart = differing(configs)
    methods = "; ".join(f"{method_name(c['method'])} {settings(c, configs)}".strip()
                        for c in configs)  # fmt: skip
    common = {"model": f"{config['model']}", "width": f"width {config['width']}",
              "epochs": f"{config['epochs']} epochs"}  # fmt: skip
    network = ", ".join(text for k, text in common.items() if k not in apart)
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    radii = {norm: [labelled(eps_key(e)) for e in evaluation[norm]] for norm in NORM_NAMES}
    passes = IN_BF16 if evaluation.get("precision") == "bf16" else ""
    return (
        f"Test accuracy in % on {rows[0]['test_images']} images of {config['data']}, {network}, "
        f"last checkpoint, seeds {', '.join(map(str, rows[0]['seeds']))}; {devices}.\n"
        f"Methods: {in_both_forms(methods)}.\n"
        f"Attacks: PGD-{evaluation['steps']}, random start, 1 restart, "
        f"{in_words(FIRST, LAST)}{passes}; "
        "model.eval(), images in [0, 1]; "
        f"l_inf {', '.join(radii['linf'])} with alpha eps/4, l2 {', '.join(radii['l2'])} "
        "with alpha eps/8.\nCost: training time per image, relative to the cheapest method."
    )


def write_outputs(rows: list[dict[str, Any]], out: Path) -> list[Path]:
    """Write summary.json, table.md and the two plots; return their paths."""
    from bench.reports.figures import plot_cost, plot_eps

    fastest = max(row["images_per_second"] for row in rows)
    for row in rows:
        row["relative_cost"] = fastest / row["images_per_second"]
        share = row["images_per_second_std"] / row["images_per_second"]
        row["relative_cost_std"] = row["relative_cost"] * share
    names = ("summary.json", "table.md", "accuracy-eps.png", "accuracy-cost.png")
    paths = [out / name for name in names]
    with alone_in(out, wait=True):
        remove_unfinished(out)
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
    refuse_unwritable(rows_path)
    runs = {config.name: config for of_seed in by_seed for config in of_seed}
    summaries = run_all(runs, evaluation, out, jobs, download)
    methods = [config.method for config in by_seed[0]]
    rows = [aggregate(m, [s for s in summaries if s["method"] == m]) for m in methods]
    paths = write_outputs(rows, out)
    paths += append_rows(rows_path, summaries)
    print(f"\n{table(rows)}\n\n{caption(rows)}\n")
    print("\n".join(f"wrote {path}" for path in paths))
    return rows
