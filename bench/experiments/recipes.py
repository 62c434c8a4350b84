"""The papers' tables: recipes times seeds times any values, and what `bench report` makes of them,
beside the published numbers."""

from itertools import product
from pathlib import Path
from typing import Any

from bench.experiments.compare import append_rows
from bench.experiments.pool import Runs, run_all
from bench.experiments.sweep import Grid, check_grid, given, named
from bench.files import refuse_unwritable
from bench.reports.runs import report_runs
from bench.settings.config import Config, resolve
from bench.settings.effects import check_effects
from bench.settings.pool import Pool


def runs_of_recipes(
    recipes: list[str], seeds: list[int], grid: Grid, options: dict[str, Any]
) -> dict[str, Config]:
    """Return the configs by their directories' names, a recipe's in one of its name, all settings
    of a seed before the next.

    Raises ValueError as resolve, for an option or a grid that no run uses, and for two
    files of one name.
    """
    check_grid([resolve(None, name, options).method for name in recipes], grid, options)
    runs: dict[str, Config] = {}
    for seed, recipe, *values in product(seeds, recipes, *grid.values()):
        config = resolve(None, recipe, options | given(grid, values) | {"seed": seed})
        own = Path(recipe).stem if recipe.endswith(".json") else recipe
        name = f"{own}/{named(config, grid)}"
        if runs.setdefault(name, config) != config:
            raise ValueError(f"two recipes of the name {own!r}; give one of the files another")
    check_effects(runs.values(), options | grid)
    return runs


def make_table(
    runs: Runs, out: Path, pool: Pool, rows_path: Path | None = None, download: bool = False
) -> list[Path]:
    """Make the runs that `out` does not hold finished, and write and print the report of all there.

    Raises as run_all.
    """
    refuse_unwritable(rows_path)
    run_all(runs, out, pool, lambda summary: append_rows(rows_path, [summary]), download)
    return report_runs([out], out)
