"""Where a run is made: in this process, in processes of this machine, or on a Ray cluster.

A place has `free`, whether it takes another run now; `start`; `ended`, which waits so many seconds
at most and yields the runs that have ended, with their summaries or why there are none; `doing`,
the runs that are under way there, each with its bar as text where it is known; and `stop`, which a
signal's handler may call: what is under way saves and stops.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.evaluation.progress import draw_on
from bench.experiments.train_and_evaluate import train_and_evaluate
from bench.files import alone_in
from bench.settings.config import Config
from bench.settings.evaluation import Evaluation
from bench.training.diverged import Diverged
from bench.training.session import Sitting
from bench.training.stopped import Stopped
from bench.training.train import train

Evaluations = dict[str, Evaluation]  # by the file of a run's directory that holds its summary
Outcome = list[dict[str, Any]] | BaseException
LINE = 240  # bytes of a worker's bar
Job = tuple[Config, Evaluations, Path, float | None, str | None]  # see `attempt`


def attempt(
    config: Config, evaluations: Evaluations, out: Path, until: float | None,
    track: str | None = None, **how: Any,
) -> Outcome:  # fmt: skip
    """Make a run; return its summaries, one an evaluation, or why there are none: Busy, Stopped,
    Diverged, ValueError or OSError. Without evaluations, train it alone.

    until: the time, as time.time() has it, at which the run saves and stops. track: a tracker, for
    whose sake no run is refused. how: see Sitting, and after_epoch as in train.
    """
    after_epoch = how.pop("after_epoch", lambda row: None)
    minutes = None if until is None else (until - time.time()) / 60
    try:
        if minutes is not None and minutes <= 0:
            raise Stopped("before it began")
        sitting = Sitting(time_budget=minutes, track=track, must_track=False, bar=True, **how)
        if not evaluations:
            with alone_in(out):
                train(config, out, after_epoch=after_epoch, sitting=sitting)
        return [
            train_and_evaluate(
                config, evaluation, out, after_epoch=after_epoch, sitting=sitting, file=file,
                bar=True,
            )  # fmt: skip
            for file, evaluation in evaluations.items()
        ]
    except (Diverged, Stopped, ValueError, OSError) as e:
        return e


class Here:
    """This process, one run after the other."""

    def __init__(self, after_epoch: Callable[[dict[str, Any]], None]):
        self.after_epoch, self.stopping = after_epoch, False
        self.made: list[tuple[str, Outcome]] = []

    @property
    def free(self) -> bool:
        return not self.made

    def start(self, name: str, job: Job) -> None:
        try:
            outcome = attempt(*job, asked=lambda: self.stopping, after_epoch=self.after_epoch)
        except Exception as e:
            outcome = e
        self.made.append((name, outcome))

    def ended(self, seconds: float) -> Iterator[tuple[str, Outcome]]:
        made, self.made = self.made, []
        yield from made

    def doing(self) -> dict[str, str]:
        return {}  # it draws its bars itself

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        pass


# ---- processes of this machine

_stopping: Any = None  # in a worker: shared with the process that started it


class Line:
    """A line of text that two processes share, which for tqdm is a terminal. It has no lock, which
    a killed process would keep: the line may be seen half written."""

    def __init__(self, shared: Any):
        self.shared = shared

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        if text := text.strip("\r\n ").rpartition("\r")[2]:
            self.shared.value = text.encode()[: len(self.shared) - 1]

    def flush(self) -> None:
        pass

    def read(self) -> str:
        return self.shared.value.decode(errors="ignore")


def start_worker(device: str | None, stopping: Any, line: Any) -> None:
    """Give a worker its GPU, as "cuda", and a line for its bars, leave Ctrl-C to its parent, which
    stops all, and end it with that: an orphan would keep its run's directory from the command that
    is repeated."""
    global _stopping
    _stopping, parent = stopping, multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    draw_on(Line(line))
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)

    def follow_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def in_worker(job: Job) -> Outcome:
    return attempt(*job, heeds_sigterm=True, asked=lambda: bool(_stopping.value))


def context_of_workers() -> Any:
    """Return what starts workers: forked, where that can be, from a process that has imported all
    and done nothing, so that one that is replaced is there at once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.experiments.places"])
    return context


@dataclass
class Worker:
    device: str | None
    pool: ProcessPoolExecutor
    line: Line


class Processes:
    """`jobs` processes a device, each with one run at a time. One that is killed, or in which
    something unknown went wrong, is replaced."""

    def __init__(self, devices: tuple[str | None, ...], jobs: int):
        self.context = context_of_workers()
        self.flag = self.context.Value("b", 0, lock=False)
        self.idle = [self.worker(device) for _ in range(jobs) for device in devices]
        self.at_work: dict[Future, tuple[str, Worker]] = {}

    def worker(self, device: str | None) -> Worker:
        line = self.context.Array("c", LINE, lock=False)
        pool = ProcessPoolExecutor(1, self.context, start_worker, (device, self.flag, line))
        return Worker(device, pool, Line(line))

    @property
    def free(self) -> bool:
        return bool(self.idle)

    @property
    def stopping(self) -> bool:
        return bool(self.flag.value)

    def start(self, name: str, job: Job) -> None:
        worker = self.idle.pop(0)
        worker.line.shared.value = b""
        self.at_work[worker.pool.submit(in_worker, job)] = name, worker

    def ended(self, seconds: float) -> Iterator[tuple[str, Outcome]]:
        for future in wait(self.at_work, seconds, FIRST_COMPLETED).done:
            name, worker = self.at_work.pop(future)
            error = future.exception()
            if error is not None:
                worker.pool.shutdown(wait=False)
                worker = self.worker(worker.device)
            self.idle.append(worker)
            if isinstance(error, BrokenProcessPool):
                error = ChildProcessError("its process was killed; was memory short?")
            yield name, error or future.result()

    def doing(self) -> dict[str, str]:
        return {name: worker.line.read() for name, worker in self.at_work.values()}

    def stop(self) -> None:
        self.flag.value = 1

    def close(self) -> None:
        for worker in self.idle:
            worker.pool.shutdown()
        for _, worker in self.at_work.values():  # where an error ends it all
            worker.pool.shutdown(wait=False, cancel_futures=True)


# ---- Ray


def on_node(folder: str, environment: dict[str, str], job: Job) -> Outcome:
    os.chdir(folder)  # that relative paths, of data and runs, are the command's
    os.environ.update(environment)
    return attempt(*job, heeds_sigterm=True)


def connected(address: str) -> Any:
    """Return ray, connected to the cluster: at an address, or, for "", to the one of RAY_ADDRESS or
    of this machine, or a new one of this machine's."""
    import ray

    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would go on asking for minutes
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
        if not ray.is_initialized():
            ray.init(address=address or None, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as e:
        raise ConnectionError(
            f"no Ray cluster answers at {address!r} ({str(e).splitlines()[0]}); start one with "
            "`ray start --head`, or leave the address out"
        ) from e
    return ray


class Cluster:
    """Tasks of a Ray cluster, which gives each its CPUs and GPUs. All are submitted at once."""

    free = True

    def __init__(self, address: str, cpus: float, gpus: float):
        self.ray, self.stopping = connected(address), False
        self.at_work: dict[Any, str] = {}
        for kind, wanted in (("CPU", cpus), ("GPU", gpus)):
            if (has := self.ray.cluster_resources().get(kind, 0)) < wanted:
                print(f"a run asks for {wanted:g} {kind}s, and the cluster has {has:g}: all wait "
                      "until it has more", file=sys.stderr)  # fmt: skip
        self.task = self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(on_node)

    def start(self, name: str, job: Job) -> None:
        tracker = (job[-1] or "").upper()
        of_tracker = {k: v for k, v in os.environ.items() if tracker and k.startswith(tracker)}
        self.at_work[self.task.remote(os.getcwd(), of_tracker, job)] = name

    def ended(self, seconds: float) -> Iterator[tuple[str, Outcome]]:
        if self.stopping:
            for task in self.at_work:
                self.ray.cancel(task)
        for task in self.ray.wait(list(self.at_work), timeout=seconds)[0] if self.at_work else ():
            yield self.at_work.pop(task), self.outcome(task)

    def outcome(self, task: Any) -> Outcome:
        try:
            return self.ray.get(task)
        except self.ray.exceptions.TaskCancelledError:
            return Stopped("before its end")
        except self.ray.exceptions.RayError as e:
            return getattr(e, "cause", None) or ChildProcessError(str(e).splitlines()[0])

    def doing(self) -> dict[str, str]:
        return dict.fromkeys(self.at_work.values(), "")

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        for task in self.at_work:
            self.ray.cancel(task)
