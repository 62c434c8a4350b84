"""What some settings need from others: without it they change nothing, and who gives them on the
command line is told."""

from collections.abc import Callable, Iterable
from typing import Any

from bench.data.known import KNOWN
from bench.settings.config import SETTINGS, Config

Needed = tuple[str, Callable[[Config], bool]]  # in words, and whether a run has it


def crops(config: Config) -> bool:
    return config.augment in ("crop", "crop-flip")


CROPS: Needed = ("augment crop or crop-flip", crops)
NEEDED: dict[str, Needed] = {
    "image_size": ("a directory of images", lambda config: config.data not in KNOWN),
    "noise_kind": ("a label_noise", lambda config: config.label_noise > 0),
    "pad": CROPS, "padding": CROPS, "cutout": CROPS,
    "workers": ("augment resized-crop", lambda config: config.reads_lazily),
    "momentum": ("SGD", lambda config: "adamw" not in (config.optimizer, config.base)),
    "second_bn": ("a second pass", lambda config: config.rho is not None
                  and config.optimizer != "msam"),
    "attack_bn": ("an adversary", lambda config: config.attack is not None),
    "awp_warmup": ("an awp_gamma", lambda config: config.awp_gamma > 0),
}  # fmt: skip


def without_effect(name: str, value: Any, configs: Iterable[Config]) -> bool:
    """Return whether an option changes none of the runs, unless it says what its setting is anyway,
    or 0. value: a grid's is a list."""
    if name not in NEEDED:
        return False
    values, usual = value if isinstance(value, list) else [value], SETTINGS[name].value
    has = NEEDED[name][1]
    return any(v not in (usual, 0) for v in values) and not any(map(has, configs))


def check_effects(configs: Iterable[Config], options: dict[str, Any]) -> None:
    """Raise ValueError for an option of the command line that is without effect on all of the runs.
    options: by the settings' names; a grid's hold lists."""
    configs = list(configs)
    for name, (needed, _) in NEEDED.items():
        if name in options and without_effect(name, options[name], configs):
            raise ValueError(f"{name} {options[name]!r} has no effect here: it needs {needed}; "
                             "leave it out, or add that")  # fmt: skip
