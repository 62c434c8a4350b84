"""Many runs, wherever they are made: each trained and evaluated before the next begins, so that
what is finished when the time is over is finished whole.

Finished runs are not repeated and interrupted ones go on. Several processes, on one machine or on
many, may work in one directory: a run that one is at work on is left to it, and taken up where it
was ended. What diverges or fails is named when the others are made.
"""

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.attacks.notation import labelled
from bench.evaluation.evaluate import NORM_NAMES
from bench.experiments.places import Cluster, Evaluations, Here, Outcome, Processes
from bench.experiments.train_and_evaluate import finished, refuse_changed_data, track_found
from bench.files import Busy, refuse_unwritable
from bench.settings.config import Config
from bench.settings.evaluation import check_judges
from bench.settings.pool import Pool
from bench.training.diverged import Diverged
from bench.training.stopped import Stopped, Terminated
from bench.training.tracking import has_all, refuse_missing
from bench.training.train import refuse_early

Summaries = list[dict[str, Any]]
Runs = dict[str, tuple[Config, Evaluations]]  # by their directories' names
ASKED_AGAIN = 2.0  # seconds between looks at what another process is at work on


def place_of(pool: Pool, after_epoch: Callable[[dict[str, Any]], None]):
    if pool.ray is not None:
        return Cluster(" ".join(pool.ray), pool.cpus_per_run, pool.gpus_per_run)
    if pool.devices or pool.jobs > 1:
        return Processes(pool.devices or (None,), pool.jobs)
    return Here(after_epoch)


def run_all(
    runs: Runs,
    out: Path,
    pool: Pool,
    each: Callable[[dict[str, Any]], object] = lambda summary: None,
    download: bool = False,
) -> dict[str, Summaries]:
    """Return every run's summaries, one an evaluation, by the runs' names and in their order.

    each: takes every summary when its run has ended. Raises ValueError, before anything is written,
    for what set_up and load_state refuse, a tracker that is not installed, and finished runs of
    other images; Diverged and ChildProcessError for runs that did or failed, after all others are
    made; Stopped where the time is over, and where what is left is at work elsewhere and not waited
    for.
    """
    if pool.device is not None:
        runs = {name: (replace(config, device=pool.device), evaluations)
                for name, (config, evaluations) in runs.items()}  # fmt: skip
    refuse_unwritable(out / "summary.json")
    if pool.track is not None:
        refuse_missing(pool.track)
    for config, evaluations in runs.values():
        for evaluation in evaluations.values():
            check_judges(evaluation, config.val)
    made = {name: summaries for name, (config, evaluations) in runs.items()
            if (summaries := found(config, evaluations, out / name)) is not None}  # fmt: skip
    left = {name: run for name, run in runs.items() if name not in made}
    refuse_all_early(left, out, pool, download)
    for name, summaries in made.items() if left else ():
        for summary in summaries:
            refuse_changed_data(runs[name][0], summary, out / name, download)
    for summary in (summary for summaries in made.values() for summary in summaries):
        each(summary)
    if left:
        out.mkdir(parents=True, exist_ok=True)
        making = Making(left, out, pool, each)
        making.make()
        if not making.due:
            track_left(pool.track, runs, out)
        made |= making.result()
    else:
        track_left(pool.track, runs, out)
    return {name: made[name] for name in runs}


def found(config: Config, evaluations: Evaluations, out: Path) -> Summaries | None:
    """Return the summaries of a run that has all of them, else None."""
    summaries = [finished(config, e, out, file) for file, e in evaluations.items()]
    whole = evaluations and None not in summaries
    return [s for s in summaries if s is not None] if whole else None


def refuse_all_early(runs: Runs, out: Path, pool: Pool, download: bool) -> None:
    """As refuse_early; of new runs that differ in the seed alone the first stands for all."""
    known = set()
    for name, (config, _) in runs.items():
        setting = replace(config, seed=0)
        if setting not in known or (out / name / "last.pt").exists():
            refuse_early(config, out / name, download, elsewhere=pool.device is not None)
        known.add(setting)


def track_left(tracker: str | None, runs: Runs, out: Path) -> None:
    """Give a tracker what it lacks of the finished runs; name those that it did not get."""
    if tracker is None:
        return
    whole = {name: (config, out / name, dict(zip(evaluations, summaries, strict=True)))
             for name, (config, evaluations) in runs.items()
             if (summaries := found(config, evaluations, out / name))}  # fmt: skip
    lacking = {name: run for name, run in whole.items() if not has_all(tracker, *run)}
    for name, run in list(lacking.items()):
        track_found(tracker, *run)
        if not has_all(tracker, *run):  # nor will it have the others: a service can take minutes
            print(f"{tracker} lacks {len(lacking)} of the {len(runs)} runs, or parts of them "
                  f"({', '.join(lacking)}); they are trained: repeat the command, and it is given "
                  "what it lacks", file=sys.stderr)  # fmt: skip
            return
        del lacking[name]


class Making:
    """The runs that are left, while they are made."""

    def __init__(self, runs: Runs, out: Path, pool: Pool, each: Callable[[dict[str, Any]], object]):
        self.runs, self.out, self.pool, self.each = runs, out, pool, each
        budget = pool.time_budget
        self.until = None if budget is None else time.time() + 60 * budget
        self.due = dict.fromkeys(runs, 0.0)  # when to begin; what is under way is not among them
        self.begun: Counter[str] = Counter()
        self.made: dict[str, Summaries] = {}
        self.failed: dict[str, BaseException] = {}
        self.elsewhere: dict[str, Busy] = {}
        self.said: set[str] = set()
        self.refusal: ValueError | None = None
        self.counted = 0.0

    def make(self) -> None:
        """Make the runs, as far as can be; `result` tells how far."""
        total = sum(config.epochs for config, _ in self.runs.values())
        bar = {"total": total, "unit": "epoch", "desc": f"{len(self.runs)} runs"}
        with (
            closing(place_of(self.pool, lambda row: self.count())) as self.place,
            stopping(self.place.stop),
            tqdm(**bar, smoothing=0.02, disable=None) as self.bar,
            closing(Lines()) as self.lines,
        ):
            under_way = 0
            while not self.ended(under_way):
                under_way += self.begin()
                for name, outcome in self.place.ended(0.5 if under_way else 0):
                    under_way -= 1
                    self.take(name, outcome)
                if not under_way and not self.ended(0):
                    time.sleep(0.1)  # what is left is at work elsewhere, or soon begun again
                self.count()
                if not self.bar.disable:
                    self.lines.show(self.under_way())
            self.count(0)

    @property
    def stopping(self) -> bool:
        return self.place.stopping or (self.until is not None and time.time() >= self.until)

    def ended(self, under_way: int) -> bool:
        left = self.due.keys() - (self.elsewhere.keys() if self.pool.no_wait else set())
        return not under_way and (not left or self.stopping or self.refusal is not None)

    def begin(self) -> int:
        """Begin the runs that are due and have a place; return how many."""
        number, now = 0, time.time()
        for name, due in list(self.due.items()):
            if not self.place.free or self.stopping or self.refusal is not None:
                break
            if due <= now:
                del self.due[name]
                config, evaluations = self.runs[name]
                job = (config, evaluations, self.out / name, self.until, self.pool.track)
                self.place.start(name, job)
                number += 1
        return number

    def take(self, name: str, outcome: Outcome) -> None:
        """Note how a run has ended, or that it is to be begun again."""
        self.elsewhere.pop(name, None)
        match outcome:
            case list():
                self.made[name] = outcome
                for summary in outcome:
                    self.each(summary)
                self.bar.write(f"{name}: {one_line(outcome[0]) if outcome else 'trained'}")
            case Busy():
                self.elsewhere[name] = outcome
                self.due[name] = time.time() + ASKED_AGAIN
                if name not in self.said and not self.pool.no_wait:
                    self.say(f"{name}: waited for, {outcome}")
                self.said.add(name)
            case ValueError():
                self.refusal = outcome
                self.place.stop()
            case Diverged():
                self.failed[name] = outcome
                self.say(f"{name}: {outcome}")
            case _ if self.stopping:
                self.due[name] = 0.0
            case Stopped() if self.until is not None and time.time() > self.until - 60:
                self.due[name] = time.time() + ASKED_AGAIN  # by another machine's clock
            case _:
                self.begin_again(name, outcome)

    def begin_again(self, name: str, error: BaseException) -> None:
        self.begun[name] += 1
        again = self.begun[name] <= self.pool.retries
        if again:
            self.due[name] = time.time() + ASKED_AGAIN
        else:
            self.failed[name] = error
        if not isinstance(error, OSError | Stopped):
            self.say("".join(traceback.format_exception(error)))
        self.say(f"{name}: failed ({error})" + ", is begun again" * again)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def count(self, seconds: float = ASKED_AGAIN) -> None:
        """Show the epochs that are done, by whatever process; at most every few seconds."""
        if time.monotonic() - self.counted < seconds:
            return
        done = sum(min(epochs_in(self.out / name), config.epochs)
                   for name, (config, _) in self.runs.items())  # fmt: skip
        self.bar.update(done - self.bar.n)
        self.counted = time.monotonic()

    def under_way(self) -> list[str]:
        """Return a line for each run that is being made."""
        return [f"{name}  {text or self.epochs_of(name)}"
                for name, text in self.place.doing().items()
                if text or epochs_in(self.out / name)]  # fmt: skip

    def epochs_of(self, name: str) -> str:
        return f"{epochs_in(self.out / name)} of {self.runs[name][0].epochs} epochs"

    def result(self) -> dict[str, Summaries]:
        """Return the summaries, or raise why there are not all."""
        if self.refusal is not None:
            raise self.refusal
        if self.due:
            kind = Terminated if self.place.stopping else Stopped
            other = f", {len(self.elsewhere)} at work elsewhere" * bool(self.elsewhere)
            raise kind(f"with {len(self.made)} of {len(self.runs)} runs made{other}")
        diverged = [name for name, error in self.failed.items() if isinstance(error, Diverged)]
        others = f"the others are made and stay in {str(self.out)!r}"
        if lost := [name for name in self.failed if name not in diverged]:
            raise ChildProcessError(
                f"{len(lost)} of {len(self.runs)} runs failed ({', '.join(lost)}), the last one as "
                f"{self.failed[lost[-1]]}; {others}: repeat the command to go on, with fewer runs "
                "at a time if memory was short"
            )
        if diverged:
            raise Diverged(
                f"{len(diverged)} of {len(self.runs)} runs diverged ({', '.join(diverged)}); "
                f"{others}: lower lr, or repeat the command without these"
            )
        return self.made


class Lines:
    """Lines of text below a bar on stderr, where that is a terminal."""

    def __init__(self) -> None:
        self.lines: list[tqdm] = []

    def show(self, texts: list[str]) -> None:
        width = shutil.get_terminal_size().columns - 1
        while len(self.lines) < len(texts):
            self.lines.append(tqdm(bar_format="{desc}", leave=False, disable=None,
                                   position=len(self.lines) + 1))  # fmt: skip
        blank = [""] * (len(self.lines) - len(texts))
        for line, text in zip(self.lines, [*texts, *blank], strict=True):
            line.set_description_str(f"  {text}"[:width])

    def close(self) -> None:
        for line in reversed(self.lines):
            line.close()


def epochs_in(folder: Path) -> int:
    """Return how many epochs of a run have ended."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


STOPPING = b"""
stopping: what trains saves at its next step, an evaluation is finished; Ctrl-C again ends at once
"""


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C call `stop`; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heed(number: int, _: Any) -> None:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        stop()
        if number == signal.SIGINT:
            os.write(2, STOPPING)  # print may be what was interrupted

    before = {one: signal.signal(one, heed) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def one_line(summary: dict[str, Any]) -> str:
    norm, by_eps = next(iter(summary["robust"].items()), ("", {}))
    at = [f"{accuracy:.1%} at {NORM_NAMES[norm]} {labelled(eps)}"
          for eps, accuracy in by_eps.items()]  # fmt: skip
    speed = f"{summary['images_per_second']:.0f} images/s in training"
    return ", ".join([f"natural {summary['natural']:.1%}", *at, speed])
