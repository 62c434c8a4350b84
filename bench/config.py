"""One run's settings: defaults, then the preset, then the method, then the command line."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from bench.attacks import Attack, parse_eps
from bench.presets import DIGITS_EVAL_EPS, EVAL_EPS, METHODS, PRESETS

CHOICES = {
    "method": tuple(METHODS),
    "augment": ("none", "crop", "crop-flip"),
    "schedule": ("piecewise", "cosine"),
    "attack_bn": ("eval", "train"),
    "amp": ("off", "bf16"),
    "backend": (None, "reference", "triton"),
    "scale": (None, "all", "weights"),
}
AT_LEAST = {"epochs": 1, "batch_size": 1, "pad": 0, "momentum": 0, "weight_decay": 0, "seed": 0,
            "interval": 1, "micro": 1}


@dataclass(frozen=True)
class Config:
    """Everything that decides the trained weights; two runs with equal configs are bit-equal.

    rho, sigma, lmbda, eta, scale, interval: as in fastsam's optimizers. late: the share of the
    epochs before SAM's first climb. ascent_part: the share of the batch that the climb's gradient
    comes from. micro: in how many parts a batch is climbed from, each by itself. eps, alpha: the
    training attack's radius and step for images in [0, 1]; None where the method does not attack.
    """

    method: str
    data: str = "digits"
    data_dir: str = ".data"
    image_size: int | None = None
    val: float = 0.1
    augment: str = "crop-flip"
    pad: int = 4
    model: str = "preactresnet18"
    width: int = 64
    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "piecewise"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float | None = None
    sigma: float | None = None
    lmbda: float | None = None
    eta: float | None = None
    scale: str | None = None
    interval: int = 1
    late: float = 0.0
    ascent_part: float = 1.0
    micro: int = 1
    eps: float | None = None
    alpha: float | None = None
    attack_steps: int | None = None
    attack_bn: str = "eval"
    seed: int = 0
    device: str = "cpu"
    amp: str = "off"
    channels_last: bool = False
    backend: str | None = None
    threads: int | None = None

    @property
    def attack(self) -> Attack | None:
        """The attack of adversarial training, or None."""
        if self.eps is None:
            return None
        return Attack(self.method.removeprefix("at-"), self.eps, self.alpha, self.attack_steps)

    @property
    def name(self) -> str:
        """The run's directory name within a comparison."""
        return f"{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class Evaluation:
    """What is measured after training; changing it never retrains. samples: None for all."""

    linf: tuple[float, ...]
    l2: tuple[float, ...]
    steps: int = 10
    samples: int | None = None
    batch_size: int = 500


def resolve(method: str, preset: str | None, options: dict[str, Any]) -> Config:
    """Return the config of `method`: each value from the most specific place that gives it.

    options: the command line's explicit values by field name, eps and alpha as text; data also
    picks the default preset. Options that the method does not use (rho for sgd) are left out, so
    that one command line serves a comparison. Raises ValueError for unknown names and values out
    of range.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    preset = preset_of(options | {"preset": preset})
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    table = PRESETS[preset]
    own = METHODS[method] | table.get(method, {})
    not_own = {k for values in METHODS.values() for k in values} - set(METHODS[method])
    known = {f.name for f in fields(Config)}
    given = {k: v for k, v in options.items() if k in known - not_own}
    for k in {"eps", "alpha"} & given.keys():
        given[k] = parse_eps(given[k], method.removeprefix("at-"), options.get("force", False))
    config = Config(**({"method": method} | table["common"] | own | given))
    check(config)
    return config


def check_used(methods: list[str], options: dict[str, Any]) -> None:
    """Raise ValueError for an option that only other methods than these have."""
    for name in options:
        users = [m for m, values in METHODS.items() if name in values]
        if users and not set(users) & set(methods):
            raise ValueError(
                f"{name} {options[name]!r} has no effect on {', '.join(methods)}; it belongs to "
                f"{', '.join(users)}"
            )


def preset_of(options: dict[str, Any]) -> str:
    """Return the preset that the command line names, or the one that suits its data."""
    by_data = {"digits": "digits", "cifar100": "sam-at-cifar100"}
    return options["preset"] or by_data.get(options.get("data", "digits"), "sam-at-cifar10")


def check(config: Config) -> None:
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(
                f"unknown {name} {getattr(config, name)!r}; choose from "
                f"{', '.join(c for c in choices if c)}"
            )
    for name, least in AT_LEAST.items():
        if not getattr(config, name) >= least:  # so that nan is refused too
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    if not 0 < config.lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {config.lr}")
    if not (0 <= config.late < 1 and 0 < config.ascent_part <= 1):
        raise ValueError(
            "late must be in [0, 1) and ascent_part in (0, 1], "
            f"got {config.late} and {config.ascent_part}"
        )
    if config.attack_steps is not None and config.attack_steps < 1:
        raise ValueError(f"attack_steps must be at least 1, got {config.attack_steps}")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"threads must be at least 1, got {config.threads}")
    usable_device(config.device)


def usable_device(name: str) -> torch.device:
    """Return the device, or raise ValueError when this machine or this torch does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        first_line = str(e).strip().splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used here ({first_line}); try --device cpu"
        ) from e
    return device


def resolve_evaluation(data: str, options: dict[str, Any]) -> Evaluation:
    """Return the evaluation settings for `data` with the command line's explicit values."""
    grid = DIGITS_EVAL_EPS if data == "digits" else EVAL_EPS
    known = {f.name for f in fields(Evaluation)}
    given = {k: v for k, v in options.items() if k in known}
    result = replace(Evaluation(**grid), **given)
    if result.steps < 1 or (result.samples is not None and result.samples < 1):
        raise ValueError(
            f"evaluation steps and samples must be at least 1, got {result.steps}, {result.samples}"
        )
    return result


def differences(old: dict[str, Any], new: Config) -> str:
    """Return "lr 0.1 -> 0.05, ..." for the fields in which a stored config differs, or ""."""
    now = asdict(new)
    keys = [k for k in now | old if old.get(k) != now.get(k)]
    return ", ".join(f"{k} {old.get(k)!r} -> {now.get(k)!r}" for k in keys)
