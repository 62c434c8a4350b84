"""What each of two processes that torchrun started trains. `test_parallel.py` compares.

Argument: a directory that both see, with a run in "terminated". Every process leaves there its own
final weights.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import bench.training.train
from bench.__main__ import COMMANDS
from bench.cli.training import train_in
from bench.settings.config import Config, resolve
from bench.training import processes
from bench.training.session import Sitting
from bench.training.stopped import Stopped
from bench.training.train import train

from ..helpers.survive import SMALL

TERMINATED = ["train", *SMALL, "--method", "sam", "--epochs", "12"]
# 1294 training images in batches of 258 and 259, which two processes cannot share evenly
COMMON = {"epochs": 2, "batch_size": 260, "width": 4, "threads": 1}
EQUAL = {  # nothing that depends on how a batch is divided
    "sgd": {},
    "sam": {"awp_gamma": 0.01},
    "fsam": {"base": "adamw", "lr": 0.01, "cutout": 3},
    "local": {"local_ascent": True},
}
DIVIDED = {  # BatchNorm, and attacks of each process's own
    "at-linf+fsam": {"attack_steps": 1, "attack_bn": "moving"},
    "trades+sam-micro": {"attack_steps": 1},
    "sam-part": {"amp": "fp16"},
    "n-fgsm": {},
}


def config_of(name: str, options: dict, processes: int) -> Config:
    method = "sam" if name == "local" else name
    return resolve(method, "digits", COMMON | options | {"processes": processes})


def without_batchnorm(name, width, channels, classes, mean, std) -> nn.Module:
    """A network whose output for one image does not depend on the others."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, classes),
    )  # fmt: skip


def keep(run, folder: Path) -> None:
    state = {"model": run.model.state_dict(), "history": run.history}
    torch.save(state, folder / f"rank{processes.rank()}.pt")


def step_by_step(config: Config, out: Path):
    """Train in sittings that end as soon as they may: every ten steps, and after every epoch."""
    sittings = 0
    while True:
        sittings += 1
        try:
            return train(config, out, sitting=Sitting(time_budget=0)), sittings
        except Stopped:
            torch.manual_seed(sittings)


def in_two_processes(folder: Path) -> None:
    assert processes.processes() == 2
    for name, options in DIVIDED.items():
        config = config_of(name, options | {"batch_size": 100, "epochs": 1}, 2)
        keep(train(config, folder / f"whole-{name}"), folder / f"whole-{name}")
        run, sittings = step_by_step(config, folder / f"cut-{name}")
        assert sittings == 3  # of ten steps, three, and none
        keep(run, folder / f"cut-{name}")
    bench.training.train.build_model = without_batchnorm
    for name, options in EQUAL.items():
        keep(train(config_of(name, options, 2), folder / name), folder / name)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    words = [*TERMINATED[1:], "--out", str(directory / "terminated")]
    options = COMMANDS["train"].parse(words)
    with processes.joined("cpu"):
        train_in(Sitting(), options)
        in_two_processes(directory)
