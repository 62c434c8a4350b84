"""The command line, made of settings: a command's options are fields of dataclasses."""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Union

import tyro
from typing_extensions import Required, TypedDict

from bench.settings.setting import Described, in_words, settings_of
from bench.spelling import meant

PROGRAM = "python -m bench"


@dataclass(frozen=True)
class Command:
    """A command of `python -m bench`.

    own: a dataclass of the options that this command alone has, whose defaults are among what is
    parsed. shared: options that stay out of it where they are not given, so that recipes, presets
    and methods fill them. more: of its help. run: takes all by name, and returns the exit code, or
    None for 0.
    """

    name: str
    help: str
    run: Callable[[dict[str, Any]], int | None]
    own: type
    shared: tuple[Described, ...] = ()
    more: str = ""

    @property
    def options(self) -> tuple[Described, ...]:
        return (*settings_of(self.own).values(), *self.shared)

    @property
    def flags(self) -> set[str]:
        """Its options as they are written, those that switch something off left out."""
        return {f"--{name}" for of in self.options if not of.setting.positional
                for name in (of.option, of.setting.alias) if name}  # fmt: skip

    @property
    def defaults(self) -> dict[str, Any]:
        own = {of.key: of.value for of in settings_of(self.own).values()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()
                if v is not MISSING}  # fmt: skip

    def parse(self, words: list[str]) -> dict[str, Any]:
        """Return what the words say, by the options' names; exit with code 2 where they cannot be
        read, after saying which option is the nearest.

        Raises ValueError for a value that the setting cannot have."""
        given = tyro.cli(
            self.parser(), args=words, prog=f"{PROGRAM} {self.name}",
            description=f"{self.help}. {self.more}".strip(". ") + ".",
        )  # fmt: skip
        for of in self.options:
            if given.get(of.key) == () and not of.setting.may_be_empty:
                raise ValueError(f"--{of.option} needs a value at least; give one, or leave it out")
            if of.key in given and not of.setting.as_text:
                of.check(given[of.key])
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        return self.defaults | listed

    def parser(self) -> Any:
        """Return the type that tyro reads: keys that are not given are not there."""
        own = {of.key: hint(of) if of.value is not MISSING else Required[hint(of)]
               for of in settings_of(self.own).values()}  # fmt: skip
        hints = own | {of.key: hint(of) for of in self.shared}
        return TypedDict(self.name, hints, total=False)  # type: ignore[operator]


def hint(of: Described) -> Any:
    """Return the type of an option, with all that the help says of it."""
    kind: Any = str if of.setting.as_text else of.kind
    kind = tuple[kind, ...] if of.several else kind
    bounds = in_words(of.setting.bounds) if of.setting.bounds else ""
    said = "; ".join(filter(None, [bounds, f"default {of.default}" if of.default else ""]))
    alias = (f"--{of.setting.alias}",) if of.setting.alias else None
    about = tyro.conf.arg(
        name=of.option, help=of.help, metavar=of.setting.metavar or metavar(of),
        aliases=alias, help_behavior_hint=f"({said})" if said else "",
    )  # fmt: skip
    if of.setting.positional:
        kind = Annotated[kind, tyro.conf.Positional]
    return Annotated[kind, about]


def metavar(of: Described) -> str | None:
    if of.setting.choices:
        return "|".join(of.setting.choices)
    return f"{of.kind.__name__.upper()}..." if of.several else None


def options_of(owner: type, *only: str, without: Iterable[str] = ()) -> tuple[Described, ...]:
    """Return the settings of a dataclass: these, or all but those."""
    return tuple(of for name, of in settings_of(owner).items()
                 if (name in only or not only) and name not in without)  # fmt: skip


def refuse_others(commands: dict[str, Command], command: Command, words: list[str]) -> None:
    """Raise ValueError for an option that this command has not and others have."""
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        others = [other.name for other in commands.values() if name in other.flags]
        if others and name not in command.flags:
            raise ValueError(f"{command.name} has no option {name}; {', '.join(others)} "
                             f"{'has' if len(others) == 1 else 'have'} it")  # fmt: skip


def parse(commands: dict[str, Command], words: list[str]) -> tuple[Command, dict[str, Any]]:
    """Return the command that the first word names, and what the others say.

    Raises ValueError for another word; prints the help and exits where there is none.
    """
    if words and not words[0].startswith("-"):
        if words[0] not in commands:
            raise ValueError(
                f"unknown command {words[0]!r}{meant(words[0], commands)}; choose from "
                f"{', '.join(commands)}"
            )
        command = commands[words[0]]
        refuse_others(commands, command, words[1:])
        return command, command.parse(words[1:])
    names = [Annotated[command.parser(), tyro.conf.subcommand(name, description=command.help)]
             for name, command in commands.items()]  # fmt: skip
    about = (
        "Train image classifiers with SGD, SAM, ASAM, Friendly-SAM or adversarial training, and "
        "measure their natural and robust accuracy. "
        f"`{PROGRAM} COMMAND --help` tells a command's options. "
        f"`{PROGRAM} compare --demo` is a first table, in minutes; "
        f"`{PROGRAM} compare --recipes 'sam-at/cifar10/*' --download` is a paper's, beside its "
        "numbers."
    )
    anyone: Any = Union[tuple(names)]  # noqa: UP007
    tyro.cli(anyone, args=words, prog=PROGRAM, description=about)
    raise AssertionError("tyro exits where no command is named")
