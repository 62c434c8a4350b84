"""A run's numbers in TensorBoard, Weights & Biases, MLflow or Trackio, by Accelerate's trackers.

tracker.json in the run's directory holds, for each tracker, its run, how many epochs that has and
which summaries, so that every sitting goes on with the same one, and what a tracker has missed can
be given to it later. An epoch is tracked after last.pt holds it, so nothing that is tracked has to
be taken back. Where a service keeps its files, and what it is logged
in as, its own environment says (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...).
"""

import json
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.files import read_json, write_json
from bench.settings.config import Config

NOTED = "tracker.json"
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
    tracker: str | None, config: Config, out: Path, history: Rows, must: bool = True
) -> Iterator[Callable[[Rows], None]]:
    """Give a function that tracks what of a run's history is not yet tracked; None: nothing is.

    history: what last.pt in `out` holds. Where the tracker cannot be started: raises ValueError, or
    warns where it need not. Later failures, such as of the network, are warned of, and the next
    call makes up for them.
    """
    run = None
    if tracker is not None:
        try:
            run = started(tracker, config, out, len(history))
        except ValueError as e:
            if must:
                raise
            warnings.warn(f"{config.name}: {e}", stacklevel=3)
    if run is None:
        yield lambda history: None
        return
    try:
        run.track(history)
        yield run.track
    finally:
        run.attempt("closed", run.tracker.finish)


def has_all(tracker: str, config: Config, out: Path, files: Iterable[str]) -> bool:
    """Return whether a tracker has a finished run's epochs and its summaries, by their files."""
    try:
        known = known_runs(out / NOTED).get(tracker, {})
    except ValueError:  # damaged, which is told when it is gone on with
        return False
    return known.get("epochs") == config.epochs and {*files} <= {*known.get("summaries", ())}


def track_finished(
    tracker: str | None, config: Config, out: Path, summaries: dict[str, dict[str, Any]]
) -> None:
    """Track what of a finished run is not tracked yet: its epochs, and its summaries, by the files
    that hold them, at the step after the last epoch's. Warns where the tracker cannot have them."""
    if tracker is None:
        return
    try:
        rows = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
        run = started(tracker, config, out, config.epochs)
        run.track(list(rows))
    except (ValueError, OSError) as e:
        warnings.warn(f"{config.name}: {e}", stacklevel=2)
        return
    for file, summary in summaries.items():
        run.track_summary(file, summary)
    run.attempt("closed", run.tracker.finish)


def accuracies(file: str, summary: dict[str, Any]) -> dict[str, float]:
    """Return a summary's accuracies: "test/natural", "test/linf-8-255", ...; a run's second one, in
    summary-1.json, has "test-1/natural"."""
    on = summary["evaluation"]["on"] + file.removeprefix("summary").removesuffix(".json")
    at = {f"{on}/{norm}-{eps.replace('/', '-')}": accuracy
          for norm, by_eps in summary["robust"].items()
          for eps, accuracy in by_eps.items()}  # fmt: skip
    return {f"{on}/natural": summary["natural"]} | at


@dataclass
class Tracked:
    """A run in a tracker. epochs: how many it has. summaries: the files of those that it has."""

    name: str
    tracker: Any
    file: Path
    run: str
    epochs: int
    summaries: list[str]

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
            numbers = {k: v for k, v in row.items()
                       if k != "epoch" and v is not None and not isinstance(v, bool)}  # fmt: skip
            log = partial(self.tracker.log, numbers, step=row["epoch"])
            if not self.attempt("given an epoch", log):
                return
            self.epochs += 1
        self.note()

    def track_summary(self, file: str, summary: dict[str, Any]) -> None:
        log = partial(self.tracker.log, accuracies(file, summary), step=summary["config"]["epochs"])
        if file not in self.summaries and self.attempt("given the accuracies", log):
            self.summaries.append(file)
            self.note()

    def note(self) -> None:
        own = {"run": self.run, "epochs": self.epochs, "summaries": self.summaries}
        write_json(self.file, known_runs(self.file) | {self.name: own})


def known_runs(file: Path) -> dict[str, Any]:
    return read_json(file, "remove it, and a new run is tracked") if file.exists() else {}


def started(tracker: str, config: Config, out: Path, epochs: int) -> Tracked:
    """Go on with the run that `out`, of so many epochs, is tracked as, or start one; one that has
    epochs which `out` lacks is another's."""
    known = known_runs(out / NOTED).get(tracker)
    if known is not None and known["epochs"] > epochs:
        known = None
    own = known or {"run": None, "epochs": 0}
    try:
        from accelerate import PartialState

        PartialState()  # Accelerate's trackers ask it which process they are in
        with redirect_stdout(sys.stderr):
            opened, run = OPEN[tracker](out, own["run"], own["epochs"])
            if known is None:
                opened.store_init_configuration(
                    {k: v for k, v in asdict(config).items() if v is not None}
                )
    except Exception as e:  # of services and networks anything can come
        raise ValueError(
            f"--track {tracker} could not start ({first_line(e)}); put that right, or leave the "
            "option out: metrics.jsonl holds the same numbers"
        ) from e
    summaries = [*own.get("summaries", ())]
    result = Tracked(tracker, opened, out / NOTED, run, own["epochs"], summaries)
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
