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


def check_effects(configs: Iterable[Config], options: dict[str, Any]) -> None:
    """Raise ValueError for an option of the command line that changes none of the runs, unless it
    says what its setting is anyway, or 0. options: by the settings' names; a grid's hold lists."""
    configs = list(configs)
    for name in options.keys() & NEEDED.keys():
        value, (needed, has) = options[name], NEEDED[name]
        values, usual = value if isinstance(value, list) else [value], SETTINGS[name].value
        if any(v not in (usual, 0) for v in values) and not any(map(has, configs)):
            raise ValueError(f"{name} {value!r} has no effect here: it needs {needed}; leave it "
                             "out, or add that")  # fmt: skip
