"""`bench recipes` and `unpack`: what there is to train with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli.parse import Command
from bench.settings.setting import MISSING, setting


@dataclass(kw_only=True)
class OfRecipes:
    part: str = setting("", "only names with this in them", positional=True)


@dataclass(kw_only=True)
class OfUnpack:
    archive: Path = setting(MISSING, "such as cifar10-60k-jpeg.tar.xz", positional=True)
    out: Path = setting(MISSING, "such as .data/cifar10-jpeg", positional=True, metavar="DIR")


def run_recipes(options: dict[str, Any]) -> None:
    from bench.settings.recipes import listing, recipe_names

    names = [name for name in recipe_names() if options["part"] in name]
    if not names:
        raise ValueError(f"no recipe has {options['part']!r} in its name")
    print(listing(names))


def run_unpack(options: dict[str, Any]) -> None:
    from bench.data.archive import unpack

    images = unpack(options["archive"], options["out"])
    counts = ", ".join(f"{n} images in {part}/" for part, n in images.items())
    print(f"{options['out']}: {counts}; use it with --data {options['out']}")


COMMANDS = (
    Command(
        "recipes", "the published settings: names, sources, published numbers", run_recipes,
        OfRecipes,
    ),
    Command(
        "unpack", "unpack a tar file of train/<class>/ and test/<class>/ into a directory for "
        "--data", run_unpack, OfUnpack,
    ),
)
