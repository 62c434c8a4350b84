"""Options and words that several commands share."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.cli.parse import options_of
from bench.settings.config import Config
from bench.settings.evaluation import Evaluation
from bench.settings.methods import ADVERSARIES, OPTIMIZERS
from bench.settings.recipes import PRESETS, names_in
from bench.settings.setting import setting, settings_of

METHODS = (
    f"{', '.join(OPTIMIZERS)}, {', '.join(ADVERSARIES)}, or two of them as at-linf+sam"
)
FILLED = (
    "What is not given is the recipe's or the preset's, then the method's, then the default told "
    "here."
)
NORMS = ("linf", "l2")
PER_PROCESS = ("sync_bn", "local_ascent")  # under torchrun, which is for train alone
CONFIG = options_of(Config, without=("seed", *PER_PROCESS))
EVALUATION = options_of(Evaluation, without=("attacks",))


@dataclass(kw_only=True)
class OfData:
    download: bool = setting(False, "let torchvision fetch CIFAR")
    force: bool = setting(False, "allow an l_inf eps above 0.25")


@dataclass(kw_only=True)
class OfRuns(OfData):
    recipe: str | None = setting(
        None, "a published setting, such as sam-at/cifar10/sam-rho0.2, or a JSON file like those "
        "in bench/recipes; `python -m bench recipes` lists them",
    )
    preset: str | None = setting(
        None, f"settings that leave the method open, of {', '.join(names_in(PRESETS))}",
        default="by data",
    )
    optimizer: str | None = setting(
        None, f"with an adversary, or --method standard: {', '.join(OPTIMIZERS)}"
    )


def evaluation_of(data: str, options: dict[str, Any]):
    from bench.attacks.notation import parse_radii
    from bench.settings.evaluation import resolve_evaluation

    given: dict[str, Any] = {
        norm: parse_radii(options[f"eval_{norm}"], norm, options["force"])
        for norm in NORMS
        if f"eval_{norm}" in options
    }
    for norm in set(NORMS) - set(options.get("norms") or NORMS):
        if norm in given:
            raise ValueError(f"--eval-{norm} has no effect: --norms leaves {norm} out")
        given[norm] = ()
    for name, of in settings_of(Evaluation).items():
        if of.key in options and name not in NORMS:
            given[name] = options[of.key]
    if "attacks" in given:
        given["attacks"] = tuple(dict.fromkeys(given["attacks"]))
        if "steps" in given and "pgd" not in given["attacks"]:
            raise ValueError(
                f"--eval-steps {given['steps']} is of the attack pgd; add it to --attacks, or "
                f"write pgd-{given['steps']}"
            )
    return resolve_evaluation(data, given)


def refuse_beside(option: str, names: Iterable[str], options: dict[str, Any]) -> None:
    """Raise ValueError for those options that are given and have no effect beside `option`."""
    for name in names:
        value = options.get(name)
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --{option}; leave one "
                             "of the two out")  # fmt: skip


def say_alpha(configs: list[Any], options: dict[str, Any]) -> None:
    """Say on stderr which alpha an --eps without --alpha takes."""
    from bench.attacks.notation import both_forms
    from bench.settings.config import takes_alpha

    found = {(c.method, c.attack) for c in configs if c.attack and takes_alpha(options)}
    for method, attack in sorted(found, key=lambda pair: (pair[0], pair[1].eps)):
        print(f"{method}: eps {both_forms(attack.eps)} takes alpha {both_forms(attack.alpha)}, the "
              "preset's share of it; --alpha sets another", file=sys.stderr)  # fmt: skip
