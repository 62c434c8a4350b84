"""What decides how a run is made, and no bit of what comes out."""

from dataclasses import dataclass
from typing import Any

from bench.settings.setting import setting

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # of Accelerate's


def tracker(help: str) -> Any:
    return setting(None, help, choices=TRACKERS)


@dataclass
class SittingSettings:
    save_every: float = setting(
        10.0, "checkpoints within an epoch; every epoch ends with one", metavar="MINUTES",
        bounds="[0, inf)",
    )
    time_budget: float | None = setting(
        None, "save and stop when they are over; repeat the command to go on", metavar="MINUTES",
        bounds="[0, inf)",
    )
    track: str | None = tracker("give a tracker the numbers of metrics.jsonl and summary.json too")
