"""A run's numbers in TensorBoard, Weights & Biases, MLflow or Trackio, by Accelerate's trackers.

tracker.json in the run's directory holds, for each tracker, its run and how many epochs that has,
so that every sitting goes on with the same one. An epoch is tracked after last.pt holds it, so
nothing that is tracked has to be taken back. Where a service keeps its files, and what it is logged
in as, its own environment says (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...).
"""

import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.files import read_json, write_json
from bench.settings.config import Config

PROJECT = "fastsam-bench"  # or what WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT say

Rows = list[dict[str, Any]]


def refuse_missing(tracker: str) -> None:
    """Raise ValueError for a tracker that is not installed."""
    needed = "torch.utils.tensorboard" if tracker == "tensorboard" else tracker
    for package, module in (("accelerate", "accelerate"), (tracker, needed)):
        try:
            import_module(module)
        except ImportError as e:
            raise ValueError(
                f"--track {tracker} needs a package that is not here ({e}); pip install {package}, "
                "or leave the option out: metrics.jsonl holds the same numbers"
            ) from e


@contextmanager
def tracked(
    tracker: str | None, config: Config, out: Path, history: Rows
) -> Iterator[Callable[[Rows], None]]:
    """Give a function that tracks what of a run's history is not yet tracked; None: nothing is.

    history: what last.pt in `out` holds. Raises ValueError where the tracker cannot be started.
    Later failures, such as of the network, are warned of, and the next call makes up for them.
    """
    if tracker is None:
        yield lambda history: None
        return
    run = started(tracker, config, out, history)
    try:
        run.track(history)
        yield run.track
    finally:
        run.attempt("closed", run.tracker.finish)


def track_summary(tracker: str | None, config: Config, out: Path, summary: dict[str, Any]) -> None:
    """Track a finished run's accuracies, at the step after its last epoch's: "test/natural",
    "test/linf-8-255", ..."""
    if tracker is None:
        return
    on = summary["evaluation"]["on"]
    values = {f"{on}/natural": summary["natural"]}
    for norm, by_eps in summary["robust"].items():
        for eps, accuracy in by_eps.items():
            values[f"{on}/{norm}-{eps.replace('/', '-')}"] = accuracy
    run = started(tracker, config, out, [{}] * config.epochs)
    run.attempt("given the accuracies", lambda: run.tracker.log(values, step=config.epochs))
    run.attempt("closed", run.tracker.finish)


class Tracked:
    """A run in a tracker. epochs: how many it has."""

    def __init__(self, name: str, tracker: Any, file: Path, run: str, epochs: int) -> None:
        self.name, self.tracker, self.file, self.run, self.epochs = name, tracker, file, run, epochs

    def attempt(self, what: str, act: Callable[[], None]) -> bool:
        """Return whether `act` succeeded; warn where it did not."""
        try:
            with redirect_stdout(sys.stderr):  # stdout is for results
                act()
        except Exception as e:  # of services and networks anything can come
            warnings.warn(f"{self.name} could not be {what} ({first_line(e)}); the training goes "
                          "on, and metrics.jsonl has the numbers", stacklevel=3)  # fmt: skip
            return False
        return True

    def track(self, history: Rows) -> None:
        for row in history[self.epochs :]:
            numbers = {k: v for k, v in row.items() if k != "epoch" and not isinstance(v, bool)}
            log = partial(self.tracker.log, numbers, step=row["epoch"])
            if not self.attempt("given an epoch", log):
                return
            self.epochs += 1
        self.note()

    def note(self) -> None:
        known = known_runs(self.file) | {self.name: {"run": self.run, "epochs": self.epochs}}
        write_json(self.file, known)


def known_runs(file: Path) -> dict[str, Any]:
    return read_json(file, "remove it, and a new run is tracked") if file.exists() else {}


def started(tracker: str, config: Config, out: Path, history: Rows) -> Tracked:
    """Go on with the run that `out` is tracked as, or start one; one that has epochs which `out`
    lacks is another's."""
    file = out / "tracker.json"
    known = known_runs(file).get(tracker)
    if known is not None and known["epochs"] > len(history):
        known = None
    run, epochs = (known["run"], known["epochs"]) if known else (None, 0)
    try:
        from accelerate import PartialState

        PartialState()  # Accelerate's trackers ask it which process they are in
        with redirect_stdout(sys.stderr):
            own, run = OPEN[tracker](out, run, epochs)
            if known is None:
                own.store_init_configuration(
                    {k: v for k, v in asdict(config).items() if v is not None}
                )
    except Exception as e:  # of services and networks anything can come
        raise ValueError(
            f"--track {tracker} could not start ({first_line(e)}); put that right, or leave the "
            "option out: metrics.jsonl holds the same numbers"
        ) from e
    result = Tracked(tracker, own, file, run, epochs)
    result.note()
    return result


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---- (directory, the run or None for a new one, its epochs) -> Accelerate's tracker, the run


def open_tensorboard(out: Path, run: str | None, epochs: int) -> tuple[Any, str]:
    from accelerate.tracking import TensorBoardTracker

    own = TensorBoardTracker("tensorboard", out, purge_step=epochs)
    own.start()
    return own, "tensorboard"


def open_wandb(out: Path, run: str | None, epochs: int) -> tuple[Any, str]:
    from accelerate.tracking import WandBTracker

    run = run or uuid.uuid4().hex[:8]
    own = WandBTracker(project("WANDB_PROJECT"), id=run, name=title(out), resume="allow")
    own.start()
    return own, run


def open_mlflow(out: Path, run: str | None, epochs: int) -> tuple[Any, str]:
    from accelerate.tracking import MLflowTracker

    own = MLflowTracker(PROJECT, run_id=run, run_name=title(out))
    own.start()
    return own, own.tracker.info.run_id


def open_trackio(out: Path, run: str | None, epochs: int) -> tuple[Any, str]:
    from accelerate.tracking import TrackioTracker

    run = run or f"{title(out)}-{uuid.uuid4().hex[:8]}"  # a run of Trackio is its name
    own = TrackioTracker(project("TRACKIO_PROJECT"), name=run, resume="allow")
    own.start()
    return own, run


OPEN = {"tensorboard": open_tensorboard, "wandb": open_wandb, "mlflow": open_mlflow,
        "trackio": open_trackio}  # fmt: skip


def project(variable: str) -> str:
    return os.environ.get(variable, PROJECT)


def title(out: Path) -> str:
    """ "runs/digits/sam-seed0" -> "digits-sam-seed0" """
    return "-".join(out.resolve().parts[-2:])
