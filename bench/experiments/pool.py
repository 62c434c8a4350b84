"""Many runs, each trained and evaluated in several ways before the next begins, so that what is
finished when the time is over is finished whole."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.experiments.compare import one_line, start_worker
from bench.experiments.train_and_evaluate import train_and_evaluate
from bench.files import alone_in
from bench.settings.config import Config
from bench.settings.evaluation import Evaluation, check_judges
from bench.training.train import refuse_early, train

Evaluations = dict[str, Evaluation]  # by the file of a run's directory that holds its summary


def trained_and_evaluated(
    config: Config, evaluations: Evaluations, out: Path
) -> list[dict[str, Any]]:
    """Return a run's summaries, one an evaluation; without any, train it alone."""
    if not evaluations:
        with alone_in(out):
            train(config, out)
    return [
        train_and_evaluate(config, evaluation, out, file=file)
        for file, evaluation in evaluations.items()
    ]


Runs = dict[str, tuple[Config, Evaluations]]  # by their directories' names


def run_grid(
    runs: Runs,
    out: Path,
    jobs: int,
    each: Callable[[dict[str, Any]], None] = lambda summary: None,
) -> list[dict[str, Any]]:
    """Return the summaries of all runs, `jobs` of which are made at a time, as they end. Finished
    ones are not repeated, interrupted ones continue.

    each: takes the summaries of every run as it ends. Raises ValueError for what train_and_evaluate
    refuses, before anything is written.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    for name, (config, evaluations) in runs.items():
        for evaluation in evaluations.values():
            check_judges(evaluation, config.val)
        refuse_early(config, out / name)
    summaries = []
    made = in_turn(runs, out) if jobs == 1 else several_at_a_time(runs, out, jobs)
    for name, of_run in tqdm(made, total=len(runs), unit="run", smoothing=0):
        for summary in of_run:
            each(summary)
        summaries += of_run
        tqdm.write(f"{name}: {one_line(of_run[0]) if of_run else 'trained'}")
    return summaries


def in_turn(runs: Runs, out: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, run in runs.items():
        yield name, trained_and_evaluated(*run, out / name)


def several_at_a_time(
    runs: Runs, out: Path, jobs: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    context = multiprocessing.get_context("spawn")
    epochs_done = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, context, start_worker, (epochs_done,)) as pool:
        futures = {
            pool.submit(trained_and_evaluated, *run, out / name): name
            for name, run in runs.items()
        }
        for future in as_completed(futures):
            if future.exception() is not None:
                pool.shutdown(wait=False, cancel_futures=True)
            yield futures[future], future.result()
