"""Where many runs are made, how many at a time, and how often one is begun again."""

import importlib.util
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Pool:
    """jobs: runs at a time, on each device. devices: such as ("cuda:0", "cuda:1"), all of a kind; a
    run sees its own as "cuda", so that it may go on on any. ray: the address of a Ray cluster, see
    bench.experiments.places.connected; there a run has so many CPUs and GPUs, and with GPUs is on
    "cuda". retries: how often a run is begun again whose process was killed or failed. time_budget:
    minutes after which all save and stop. no_wait: for the runs of other processes. Raises
    ValueError.
    """

    jobs: int = 1
    devices: tuple[str, ...] = ()
    ray: str | None = None
    cpus_per_run: float = 1.0
    gpus_per_run: float = 0.0
    retries: int = 2
    time_budget: float | None = None
    no_wait: bool = False

    def __post_init__(self) -> None:
        for name, least in (("jobs", 1), ("retries", 0), ("cpus_per_run", 0), ("gpus_per_run", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.time_budget is not None and not 0 < self.time_budget < math.inf:
            raise ValueError(f"time_budget must be above 0 minutes, got {self.time_budget}")
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
