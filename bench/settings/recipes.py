"""Recipes: one JSON file per published setting, and presets, which leave the method open.

A file holds "config", values by the names of bench.settings.config.Config. It may hold "methods",
values for one optimizer or adversary; "extends", the recipe whose values it starts from; "source",
where the setting comes from; "published", the numbers in % that the source reports; and "note",
what the source leaves open and what was chosen.
"""

import fnmatch
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.settings.methods import ADVERSARIES, OPTIMIZERS, with_relatives
from bench.spelling import meant

RECIPES = Path(__file__).parents[1] / "recipes"
PRESETS, STUDIES = RECIPES / "presets", RECIPES / "studies"
KEYS: dict[str, type] = {"extends": str, "note": str, "source": dict, "published": dict,
                         "config": dict, "methods": dict}  # fmt: skip
INNER: dict[str, Any] = {"methods": dict, "published": (int, float)}  # of their values
KINDS = {str: "text", dict: "an object", (int, float): "a number"}


@dataclass
class Recipe:
    """A recipe with what it extends merged in. notes: the base's first."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        return {k for values in (self.config, *self.methods.values()) for k in values}

    def values(self, adversary: str | None, optimizer: str) -> dict[str, Any]:
        """Return the recipe's values for a method, the method's own over the common ones."""
        own = with_relatives(self.methods, optimizer) | with_relatives(self.methods, adversary)
        return {k: v for k, v in self.config.items() if k != "method"} | own


def recipe_names() -> list[str]:
    """Return the names of all recipes, such as "sam-at/cifar10/sam-rho0.2"; presets and studies are
    none."""
    files = (p for p in RECIPES.rglob("*.json") if p.stem != "base")
    names = (p.relative_to(RECIPES).as_posix().removesuffix(".json") for p in files)
    return sorted(name for name in names if not name.startswith(("presets/", "studies/")))


def recipes_matching(patterns: list[str]) -> list[str]:
    """Return the recipes that match any of the patterns, such as "sam-at/cifar10/*", and the JSON
    files among them. Raises ValueError for a pattern that none matches."""
    known, found = recipe_names(), []
    for pattern in patterns:
        own = pattern.endswith(".json") and Path(pattern).is_file()
        names = [pattern] if own else fnmatch.filter(known, pattern)
        if not names:
            raise ValueError(
                f"no recipe matches {pattern!r}{meant(pattern, known)}; `python -m bench recipes` "
                "lists them"
            )
        found += names
    return list(dict.fromkeys(found))


def names_in(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.json"))


def load_recipe(name: str, extending: tuple[Path, ...] = ()) -> Recipe:
    """Return the recipe of this name, a preset by its short name, or the JSON file at a path.

    extending: the files that extend it. Raises ValueError for an unknown name and for a file that
    is no recipe.
    """
    places = [RECIPES / f"{name}.json", PRESETS / f"{name}.json", Path(name)]
    path = next((p for p in places if p.suffix == ".json" and p.is_file()), None)
    if path is None:
        presets = names_in(PRESETS)
        raise ValueError(
            f"unknown recipe or preset {name!r}{meant(name, [*presets, *recipe_names()])}; `python "
            f"-m bench recipes` lists the recipes, the presets are {', '.join(presets)}"
        )
    text = read_recipe(path)
    if path in extending:
        raise ValueError(f"{str(path)!r} extends itself; name another recipe there")
    config, methods = text.get("config", {}), text.get("methods", {})
    base = Recipe(name)
    if "extends" in text:
        base = load_recipe(text["extends"], (*extending, path))
    inherited = {
        m: {k: v for k, v in values.items() if k not in config}
        for m, values in base.methods.items()
    }
    return Recipe(
        name,
        base.config | config,
        inherited | {m: inherited.get(m, {}) | values for m, values in methods.items()},
        base.source | text.get("source", {}),
        text.get("published", {}),
        base.notes + ([text["note"]] if "note" in text else []),
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Return what a recipe's file holds. Raises ValueError for a file of another form, and for
    values of methods that there are not."""
    try:
        text = json.loads(path.read_text("utf-8"))
        odd = sorted(text.keys() - KEYS.keys())
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{str(path)!r} is not a recipe ({e}); see bench/recipes/README.md") from e
    if odd:
        raise ValueError(
            f"{str(path)!r} has the unknown keys {odd}{meant(odd[0], KEYS)}; known are "
            f"{sorted(KEYS)}"
        )
    refuse_kinds(text, path)
    known = (*OPTIMIZERS, *ADVERSARIES)
    for method in text.get("methods", {}):
        if method not in known:
            raise ValueError(f"{str(path)!r} has values for {method!r}{meant(method, known)}; they "
                             f"are for one of {', '.join(known)}")  # fmt: skip
    return text


def refuse_kinds(text: dict[str, Any], path: Path) -> None:
    """Raise ValueError for a value of another kind than a recipe's."""
    outer = [(k, value, KEYS[k]) for k, value in text.items()]
    inner = [(f"{k}: {name}", value, kind) for k, kind in INNER.items()
             for name, value in (text[k].items() if isinstance(text.get(k), dict) else ())]
    for where, value, kind in (*outer, *inner):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{str(path)!r}: {where} must be {KINDS[kind]}, got {value!r}; see "
                             "bench/recipes/README.md")  # fmt: skip


def listing(names: list[str]) -> str:
    """Return the papers, then a line a recipe: its name, its place in the paper, and what is
    reported there, in %; below a single one its notes."""
    recipes = [load_recipe(name) for name in names]
    papers = {name.split("/")[0]: r.source["paper"] for name, r in zip(names, recipes, strict=True)}
    lines = [
        (r.name, f"{r.source['table']}: {r.source['row']}",
         ", ".join(f"{k} {v:g}" for k, v in r.published.items()))
        for r in recipes
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    notes = recipes[0].notes if len(recipes) == 1 else []
    return "\n".join([*(f"{k}: {paper}" for k, paper in papers.items()), "", *table, *notes])
