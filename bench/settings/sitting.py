"""What decides how a run is made, and no bit of what comes out."""

from dataclasses import dataclass

from bench.settings.setting import setting

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # of Accelerate's


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
    track: str | None = setting(
        None, "give a tracker the numbers of metrics.jsonl too", choices=TRACKERS,
    )
