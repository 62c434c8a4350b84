"""`bench options`: every setting as a table, from which docs/options.md is made."""

from dataclasses import dataclass
from typing import Any

from bench.cli.parse import Command
from bench.settings.config import Config
from bench.settings.evaluation import Evaluation
from bench.settings.pool import Pool
from bench.settings.setting import Described, settings_of
from bench.settings.sitting import SittingSettings

INTRODUCTION = """# Options of a run

`train`, `compare` and `sweep` have these, the last two tables as they say; `python -m bench COMMAND
--help` tells a command's own too. What is not given is the recipe's or the preset's, then the
method's, then the default here. A recipe names a setting with `_` for `-`. `--attacks` is
`evaluate`'s, which has the second table, too: the others measure by `pgd`.

This page is what `python -m bench options` prints. What it tells stands once, beside the settings'
fields, from which the command line and the checks come too ([extending](extending.md))."""
TABLES = {"What is trained": Config, "What is measured": Evaluation,
          "How `train` goes": SittingSettings,
          "Where `compare`, `sweep` and `study` make their runs": Pool}  # fmt: skip


@dataclass
class OfOptions:
    pass


def row(of: Described) -> list[str]:
    kind = "text" if of.setting.as_text or of.kind is str else of.kind.__name__
    values = ", ".join(of.setting.choices) or f"{kind} {of.setting.bounds}".strip()
    users = ", ".join(of.setting.used_by) if len(of.setting.used_by) < 6 else "SAM methods"
    return [f"`--{of.option}`", values, of.default, users, of.setting.help]


def table(owner: type) -> str:
    """Return a dataclass's settings as Markdown, not padded: a change is a line."""
    head = ["option", "values", "default", "used by", "what"]
    lines = [head, ["---"] * 5, *(row(of) for of in settings_of(owner).values())]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"
                     for line in lines)  # fmt: skip


def document() -> str:
    parts = [f"## {title}\n\n{table(owner)}" for title, owner in TABLES.items()]
    return "\n\n".join([INTRODUCTION, *parts])


def run_options(options: dict[str, Any]) -> None:
    print(document())


COMMANDS = (
    Command("options", "every setting of a run: values, default, methods that use it", run_options,
            OfOptions),
)
