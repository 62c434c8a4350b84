"""A setting: a dataclass's field that says all that is to be known of it, once.

The command line, its help, the checks, a table's caption, the recipes' validation and the options'
table in the docs are made of these fields.
"""

import math
from dataclasses import MISSING as MISSING
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from bench.spelling import meant

KINDS = (bool, int, float, str)


@dataclass(frozen=True)
class Setting:
    """What a field is for.

    help: for users. choices: the values of a word. bounds: the interval of a number, such as
    "[0, 1)". used_by: the methods that use it, with their defaults; {}: not of a method. option:
    its name on the command line, where that is not the field's. alias: another one. metavar: what
    stands for its value in the help. as_text: the command line leaves it as it is written (8/255).
    positional: it has no name there. may_be_empty: of several values, none is a value. default: in
    words, where the field's default does not say it. told: a table's caption tells it where it is
    not the default, as it does of what is used_by methods. machine: it decides where a run happens
    and perhaps bits, not what is trained.
    """

    help: str
    choices: tuple[str, ...] = ()
    bounds: str = ""
    used_by: dict[str, Any] = field(default_factory=dict)
    option: str = ""
    alias: str = ""
    metavar: str = ""
    as_text: bool = False
    positional: bool = False
    may_be_empty: bool = False
    default: str = ""
    told: bool = False
    machine: bool = False


def setting(value: Any, help: str, **of: Any) -> Any:
    """Return a dataclass's field of this default (MISSING: none), which is an option of users."""
    return field(default=value, metadata={"setting": Setting(help, **of)})


@dataclass(frozen=True)
class Described:
    """A field with its setting. kind: bool, int, float or str, of the value or of each of several;
    or another type. several: it holds any number of values. optional: None is one."""

    name: str
    value: Any
    setting: Setting
    kind: type
    several: bool
    optional: bool

    @property
    def key(self) -> str:
        """Its name among a command line's options."""
        return self.option.replace("-", "_")

    @property
    def told(self) -> bool:
        """Whether a table's caption tells it where it is not the default."""
        return self.setting.told or (bool(self.setting.used_by) and not self.setting.machine)

    @property
    def option(self) -> str:
        return self.setting.option or self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raise ValueError for a value of another kind, none of the choices, or out of bounds."""
        if value is None and self.optional:
            return
        for one in value if self.several else [value]:
            check_one(self, one)

    @property
    def help(self) -> str:
        """Its help, which begins with the methods where they are few."""
        own = self.setting.used_by
        return f"{', '.join(own)}: {self.setting.help}" if 0 < len(own) < 4 else self.setting.help

    @property
    def default(self) -> str:
        """Its default in words, that of methods included; "" where there is none."""
        if self.setting.default:
            return self.setting.default
        if own := self.setting.used_by:
            return by_method({method: written(value) for method, value in own.items()})
        return "" if self.value in (MISSING, None) else written(self.value)


def check_one(of: Described, value: Any) -> None:
    kind, choices, bounds = of.kind, of.setting.choices, of.setting.bounds
    where = f"--{of.option}: " if of.setting.option else ""
    name = where + of.name
    if choices and value not in choices:
        raise ValueError(
            f"{where}unknown {of.name} {value!r}{meant(value, choices)}; choose from "
            f"{', '.join(choices)}"
        )
    accepted = (int, float) if kind is float else (kind,)
    if kind in KINDS and (not isinstance(value, accepted) or isinstance(value, bool) is not
                          (kind is bool)):  # fmt: skip
        raise ValueError(f"{name} must be {NOUNS[kind]}, got {value!r}")
    if bounds and not inside(value, bounds):
        raise ValueError(f"{name} must be {in_words(bounds)}, got {value}")


def by_method(defaults: dict[str, str]) -> str:
    """{"sam": "0.1", "fsam": "0.1", "asam": "2"} -> "0.1; 2 for asam"."""
    values = list(defaults.values())
    usual = max(values, key=values.count)
    others = {v: [m for m in defaults if defaults[m] == v] for v in values if v != usual}
    return "; ".join([usual, *(f"{v} for {', '.join(methods)}" for v, methods in others.items())])


NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def ends(bounds: str) -> tuple[float, float]:
    low, high = bounds[1:-1].split(",")
    return float(low), float(high)


def inside(value: float, bounds: str) -> bool:
    """inside(1, "[0, 1)") is False, and so is inside(nan, ...)."""
    low, high = ends(bounds)
    above = low <= value if bounds[0] == "[" else low < value
    return above and (value <= high if bounds[-1] == "]" else value < high)


def in_words(bounds: str) -> str:
    """Return "at least 1" for "[1, inf)", "in [0, 1)" for that."""
    low, high = ends(bounds)
    if low == -math.inf and high == math.inf:
        return "finite"
    if high < math.inf:
        return f"in {bounds}"
    return f"at least {low:g}" if bounds[0] == "[" else "positive and finite"


def written(value: Any) -> str:
    """Return a default as users write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else f"{value}"


@cache
def settings_of(owner: Any) -> dict[str, Described]:
    """Return the fields of a dataclass that are settings, by name."""
    hints = get_type_hints(owner)
    return {f.name: described(f.name, f.default, f.metadata["setting"], hints[f.name])
            for f in fields(owner) if "setting" in f.metadata}  # fmt: skip


def described(name: str, value: Any, of: Setting, hint: Any) -> Described:
    optional = type(None) in get_args(hint)
    if optional:
        hint = next(a for a in get_args(hint) if a is not type(None))
    several = get_origin(hint) in (tuple, list)
    return Described(name, value, of, get_args(hint)[0] if several else hint, several, optional)


def check_settings(values: object) -> None:
    """Raise ValueError for a value of a dataclass's settings that cannot be."""
    owner: Any = type(values)
    for name, of in settings_of(owner).items():
        of.check(getattr(values, name))
