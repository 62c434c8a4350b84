"""The product of methods, seeds and values of any options; a table with a line a setting.

A run's directory is named by its method, its values and its seed. A value that a method does not
use is not in its config, so that such runs coincide and are made once.
"""

from itertools import product
from pathlib import Path
from typing import Any

from bench.attacks.notation import eps_key, labelled, refuse_mixed
from bench.evaluation.evaluate import NORM_NAMES
from bench.experiments.compare import append_rows
from bench.experiments.pool import run_all
from bench.files import alone_in, refuse_unwritable, remove_unfinished, write_json, write_text
from bench.reports.statistics import aggregate, warned
from bench.reports.tables import markdown
from bench.settings.config import SETTINGS, Config, check_used, resolve
from bench.settings.effects import check_effects
from bench.settings.evaluation import Evaluation
from bench.settings.names import method_name
from bench.settings.pool import Pool
from bench.spelling import meant

Grid = dict[str, list[Any]]
KINDS = {
    name: str if of.setting.as_text else of.kind
    for name, of in SETTINGS.items()
    if name not in ("seed", "data") and of.kind is not bool
}


def parse_grid(texts: list[str], options: dict[str, Any]) -> Grid:
    """["rho=0.1,0.2", "label-noise=0.4"] -> {"rho": [0.1, 0.2], "label_noise": [0.4]}.

    eps and alpha stay text, such as 8/255. Raises ValueError for what is no option of a run, is
    given twice or has another kind of value.
    """
    grid: Grid = {}
    for text in texts:
        option, equals, values = text.partition("=")
        name = option.replace("-", "_")
        if not equals or not values:
            raise ValueError(f"--grid {text!r} has no values; write it as rho=0.05,0.1")
        if name not in KINDS:
            known = sorted(k.replace("_", "-") for k in KINDS)
            raise ValueError(
                f"--grid {text!r}: {option!r} is not an option with values to sweep over"
                f"{meant(option, known)}; choose from {', '.join(known)}; --methods and --seeds "
                "are options of their own, and a sweep has one data set and one recipe"
            )
        if name in grid or name in options:
            raise ValueError(f"{option} is given twice; leave it in --grid alone")
        kind = KINDS[name]
        try:
            grid[name] = [kind(value) for value in values.split(",")]
        except ValueError as e:
            raise ValueError(f"--grid {text!r}: {option} needs values of {kind.__name__}") from e
        if name in ("eps", "alpha"):
            refuse_mixed(grid[name], f"--grid {text}")
    return grid


def shown(name: str, value: Any) -> str:
    """Return a config's value as tables write it; "-" where the method does not use it."""
    if value is None:
        return "-"
    return labelled(eps_key(value)) if name in ("eps", "alpha") else f"{value}"


def runs_of(
    methods: list[str], seeds: list[int], grid: Grid, preset: str, options: dict[str, Any]
) -> dict[str, Config]:
    """Return the configs by their directories' names, all settings of a seed before the next.

    Raises ValueError as resolve, and for an option or a grid that no run uses.
    """
    check_grid(methods, grid, options)
    runs = {
        named(config, grid): config
        for seed, method, *values in product(seeds, methods, *grid.values())
        for config in [resolve(method, preset, options | given(grid, values) | {"seed": seed})]
    }
    check_effects(runs.values(), options | grid)
    return runs


def given(grid: Grid, values: list[Any]) -> dict[str, Any]:
    return dict(zip(grid, values, strict=True))


def check_grid(methods: list[str], grid: Grid, options: dict[str, Any]) -> None:
    """Raise ValueError for an option or a grid that no method uses."""
    check_used(methods, options)
    for name, values in grid.items():
        check_used(methods, {name: values})


def named(config: Config, grid: Grid) -> str:
    """Return the name of a run's directory."""
    own = {k: getattr(config, k) for k in grid}
    parts = [f"{k}{v}" for k, v in own.items() if v is not None]
    return "-".join([config.method, *parts, f"seed{config.seed}"])


def by_setting(summaries: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Return an `aggregate` a setting: a method and its values of `names`, in "setting"."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for summary in summaries:
        key = (summary["method"], *(summary["config"][k] for k in names))
        groups.setdefault(key, []).append(summary)
    return [
        aggregate(method, group) | {"setting": dict(zip(names, values, strict=True))}
        for (method, *values), group in sorted_groups(groups)
    ]


def sorted_groups(groups: dict[tuple, Any]) -> list[tuple[tuple, Any]]:
    """Order by method as first met, then by value."""
    order = {method: i for i, method in enumerate(dict.fromkeys(key[0] for key in groups))}

    def place(item: tuple[tuple, Any]) -> tuple:
        method, *values = item[0]
        return order[method], *map(value_key, values)

    return sorted(groups.items(), key=place)


def value_key(value: Any) -> tuple:
    return (value is not None, value if isinstance(value, int | float) else 0, str(value))


def table(rows: list[dict[str, Any]]) -> str:
    """Return `by_setting` as a Markdown table; accuracies in %, mean ± std over several
    seeds."""
    names = list(rows[0]["setting"])
    columns = [(norm, eps) for norm, radii in rows[0]["robust"].items() for eps in radii]
    heads = [k.replace("_", " ") for k in names] + ["seeds", "natural"]
    lines = []
    for row in rows:
        values = [(row["natural"], row["natural_std"])]
        values += [(row["robust"][n][e], row["robust_std"][n][e]) for n, e in columns]
        setting = [shown(k, v) for k, v in row["setting"].items()]
        several = len(row["seeds"]) > 1
        cells = [f"{100 * mean:.1f}" + f" ± {100 * std:.1f}" * several for mean, std in values]
        lines.append([method_name(row["method"]), *setting, str(len(row["seeds"])), *cells])
    heads += [f"{NORM_NAMES[norm]} {labelled(eps)}" for norm, eps in columns]
    return markdown(["method", *heads], lines, left=1)


def with_warnings(rows: list[dict[str, Any]]) -> str:
    """Return the table, and below it what the evaluations warned of."""
    found = []
    for row in rows:
        used = {k: v for k, v in row["setting"].items() if v is not None}
        values = [f"{k.replace('_', ' ')} {shown(k, v)}" for k, v in used.items()]
        found += warned(", ".join([method_name(row["method"]), *values]), row)
    return "\n\n".join([table(rows), *["\n".join(found)] * bool(found)])


def sweep(
    runs: dict[str, Config],
    names: list[str],
    evaluation: Evaluation,
    out: Path,
    pool: Pool,
    rows_path: Path | None = None,
    download: bool = False,
) -> list[dict[str, Any]]:
    """Make the runs that `out` does not hold finished; write, print and return a row a setting.

    runs: see runs_of. names: the options that differ. rows_path: a JSONL file to append one row a
    run to. Raises ValueError as run_all, before anything is written.
    """
    refuse_unwritable(rows_path)
    whole = {name: (config, {"summary.json": evaluation}) for name, config in runs.items()}
    made = run_all(whole, out, pool, download=download)
    summaries = [summary for (summary,) in made.values()]
    rows = by_setting(summaries, names)
    with alone_in(out, wait=True):
        remove_unfinished(out)
        write_json(out / "summary.json", rows)
        write_text(out / "table.md", f"{with_warnings(rows)}\n")
    paths = [out / "summary.json", out / "table.md", *append_rows(rows_path, summaries)]
    print(f"\n{with_warnings(rows)}\n")
    print("\n".join(f"wrote {path}" for path in paths))
    return rows
