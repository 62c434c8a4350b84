"""What decides how a run is made, and no bit of what comes out."""

from dataclasses import dataclass

from bench.settings.setting import setting


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
    tensorboard: bool = setting(False, "write TensorBoard's files beside metrics.jsonl too")
