"""Where many runs are made, how many at a time, and how often one is begun again."""

import importlib.util
from dataclasses import dataclass

from bench.settings.setting import check_settings, setting
from bench.settings.sitting import tracker


@dataclass(frozen=True)
class Pool:
    """A run sees its device as "cuda", so that it may go on on any, and on a Ray cluster it is on
    "cuda" where it has GPUs. ray: no address, or one; None: no Ray. Raises ValueError."""

    jobs: int = setting(1, "runs at a time, on each of --devices", bounds="[1, inf)",
                        default="1; 2 for study and --demo")  # fmt: skip
    devices: tuple[str, ...] = setting(
        (), "cuda:0 cuda:1 ...: processes of its own on each; seen as cuda", metavar="DEVICE..."
    )
    ray: tuple[str, ...] | None = setting(
        None, "runs are tasks of a Ray cluster: at the address, RAY_ADDRESS's, this machine's, or "
        "a new one", metavar="[ADDRESS]", may_be_empty=True,
    )
    cpus_per_run: float = setting(1.0, "with --ray", bounds="[0, inf)", default="--threads, or 1")
    gpus_per_run: float = setting(0.0, "with --ray; above 0, runs are on cuda", bounds="[0, inf)")
    retries: int = setting(
        2, "how often a run is begun again whose process was killed or failed", bounds="[0, inf)"
    )
    time_budget: float | None = setting(
        None, "all runs save and stop when they are over; repeat the command to go on",
        metavar="MINUTES", bounds="(0, inf)",
    )
    no_wait: bool = setting(
        False, "end when all that is left is at work in other processes; the last one makes the "
        "table",
    )
    track: str | None = tracker(
        "give a tracker the numbers of metrics.jsonl and of the summaries too, each run as its own"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.ray is None and (self.cpus_per_run, self.gpus_per_run) != (1, 0):
            raise ValueError("--cpus-per-run and --gpus-per-run are for --ray; runs on this "
                             "machine take --jobs, --devices and --threads")  # fmt: skip
        if self.ray is not None:
            self.check_ray()
        refuse_missing(self.devices)

    def check_ray(self) -> None:
        if self.devices or self.jobs > 1:
            raise ValueError("Ray decides how many runs there are at a time, and on which devices: "
                             "leave out --devices and --jobs, and say what a run needs with "
                             "--cpus-per-run and --gpus-per-run")  # fmt: skip
        if len(self.ray or ()) > 1:
            raise ValueError(f"--ray takes one address, got {' '.join(self.ray or ())}")
        if importlib.util.find_spec("ray") is None:
            raise ValueError("--ray needs a package that is not here; pip install ray")

    @property
    def device(self) -> str | None:
        """What a run's config says; None: what it says anyway."""
        if self.ray is not None:
            return "cuda" if self.gpus_per_run else "cpu"
        return self.devices[0].partition(":")[0] if self.devices else None


def refuse_missing(devices: tuple[str, ...]) -> None:
    """Raise ValueError for devices that are not here, or of several kinds; use none of them."""
    import torch

    for name in devices:
        kind, _, number = name.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
            raise ValueError(f"--devices cannot be {name!r}; they are cpu, or cuda:0 cuda:1 ...")
        if kind != devices[0].partition(":")[0]:
            raise ValueError(f"--devices {' '.join(devices)} give runs other bits by chance: "
                             "choose one kind")  # fmt: skip
        if kind == "cuda" and int(number or 0) >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"device {name!r} is not here, of {gpus} GPUs; try --devices cpu cpu")
