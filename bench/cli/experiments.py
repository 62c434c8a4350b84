"""`bench compare`, `sweep` and `study`: many runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli.parse import Command, options_of
from bench.cli.shared import (
    CONFIG,
    EVALUATION,
    FILLED,
    METHODS,
    OfRuns,
    evaluation_of,
    refuse_beside,
    say_alpha,
)
from bench.settings.pool import Pool
from bench.settings.recipes import STUDIES, names_in
from bench.settings.setting import MISSING, setting

POOL = options_of(Pool)
COMPARED = ("sgd", "sam", "fsam", "at-linf")


@dataclass(kw_only=True)
class OfMany(OfRuns):
    seeds: tuple[int, ...] | None = setting(
        None, "a run each", default="0 1 2", metavar="SEED..."
    )
    recipes: tuple[str, ...] | None = setting(
        None, "in place of --methods: published settings, such as 'sam-at/cifar10/*', and JSON "
        "files; ends with `bench report` of --out, beside the papers' numbers",
        metavar="PATTERN...",
    )
    rows: Path | None = setting(None, "append a row a run to this JSONL", metavar="FILE")


@dataclass(kw_only=True)
class OfCompare(OfMany):
    methods: tuple[str, ...] | None = setting(
        None, f"of {METHODS}", default=" ".join(COMPARED), metavar="METHOD..."
    )
    demo: bool = setting(
        False, "a few minutes on two CPU cores: --preset digits, and --seeds 0 1 --jobs 2 "
        "--threads 1 unless given",
    )
    out: Path | None = setting(None, "the runs' directory", default="runs/PRESET", metavar="DIR")


@dataclass(kw_only=True)
class OfSweep(OfMany):
    methods: tuple[str, ...] | None = setting(None, f"of {METHODS}", metavar="METHOD...")
    grid: tuple[str, ...] = setting(
        (), "such as rho=0.05,0.1 label-noise=0,0.4; any option of a run that has a value",
        metavar="OPTION=VALUE,...",
    )
    out: Path | None = setting(
        None, "the runs' directory", default="runs/sweep-PRESET", metavar="DIR"
    )


@dataclass(kw_only=True)
class OfStudy:
    name: str = setting(MISSING, f"of {', '.join(names_in(STUDIES))}", positional=True)
    rows: Path | None = setting(
        None, "append a row a run and evaluation to this JSONL", metavar="FILE"
    )
    out: Path | None = setting(
        None, "the runs' directory", default="runs/study-NAME", metavar="DIR"
    )
    train_only: bool = setting(False, "train all runs; a later call evaluates them")
    show: Path | None = setting(
        None, "train nothing; print the table of these rows", metavar="ROWS"
    )
    figure: Path | None = setting(None, "with --show: draw the figure there", metavar="FILE")


def pool_of(options: dict[str, Any], jobs: int = 1) -> Pool:
    if "device" in options and {"devices", "ray"} & options.keys():
        raise ValueError(f"--device {options['device']} has no effect with --devices or --ray; "
                         "with --ray pass --gpus-per-run 1 for a GPU each")  # fmt: skip
    given = {of.name: tuple(value) if isinstance(value, list) else value
             for of in POOL if (value := options.get(of.key)) is not None}  # fmt: skip
    if not {"devices", "ray"} & given.keys():
        given = {"jobs": jobs} | given
    if "ray" in given:
        given = {"cpus_per_run": options.get("threads", 1)} | given
    return Pool(**given)


def combined(methods: list[str], optimizer: str | None) -> list[str]:
    """Return a comparison's methods with its --optimizer in those that name none."""
    from bench.settings.methods import ADVERSARIES, method_of

    open_ones = {*ADVERSARIES, "standard"} & set(methods)
    if optimizer is not None and not open_ones:
        raise ValueError(
            f"optimizer {optimizer!r} has no effect on {', '.join(methods)}, which name theirs"
        )
    named = [method_of(m, optimizer if m in open_ones else None) for m in methods]
    return list(dict.fromkeys(named))


def of_demo(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the demo's where they are not given. Raises ValueError for settings
    of another name than the demo's."""
    for name in ("recipes", "recipe", "preset"):
        if options[name] and (name, options[name]) != ("preset", "digits"):
            raise ValueError(f"--demo is --preset digits, and --{name} asks for other settings; "
                             "leave one of the two out")  # fmt: skip
    jobs = {} if {"devices", "ray"} & options.keys() else {"jobs": 2}
    given = {k: value for k, value in options.items() if value is not None}
    return options | {"preset": "digits", "seeds": [0, 1], "threads": 1} | jobs | given


def with_seeds(options: dict[str, Any]) -> dict[str, Any]:
    return options if options["seeds"] else options | {"seeds": [0, 1, 2]}


def run_compare(options: dict[str, Any]) -> None:
    from bench.experiments.compare import compare
    from bench.settings.config import check_used, folder_of, preset_of, resolve
    from bench.settings.effects import check_effects

    options = with_seeds(of_demo(options) if options["demo"] else options)
    pool = pool_of(options)
    if options["recipes"]:
        return compare_recipes(options, {}, pool)
    methods = combined(options["methods"] or [*COMPARED], options.pop("optimizer", None))
    check_used(methods, options)
    by_seed = [
        [resolve(m, preset_of(options), options | {"seed": seed}) for m in methods]
        for seed in options["seeds"]
    ]
    check_effects(by_seed[0], options)
    evaluation = evaluation_of(by_seed[0][0].data, options)
    out = options["out"] or folder_of(preset_of(options))
    say_alpha(by_seed[0], options)
    compare(by_seed, evaluation, out, pool, options["rows"], options["download"])


def compare_recipes(options: dict[str, Any], grid: dict[str, list[Any]], pool: Pool) -> None:
    from bench.experiments.recipes import make_table, runs_of_recipes
    from bench.settings.recipes import recipes_matching

    for name in ("methods", "recipe", "preset"):
        if options[name]:
            raise ValueError(f"--{name} has no effect with --recipes; leave one of the two out")
    names = recipes_matching(options["recipes"])
    configs = runs_of_recipes(names, options["seeds"], grid, options)
    say_alpha(list(configs.values()), options | grid)
    runs = {name: (config, {"summary.json": evaluation_of(config.data, options)})
            for name, config in configs.items()}  # fmt: skip
    out = options["out"] or Path("runs/recipes")
    make_table(runs, out, pool, options["rows"], options["download"])


def run_sweep(options: dict[str, Any]) -> None:
    from bench.experiments.sweep import parse_grid, runs_of, sweep
    from bench.settings.config import preset_of

    options = with_seeds(options)
    grid, pool = parse_grid(options["grid"], options), pool_of(options)
    if options["recipes"]:
        return compare_recipes(options, grid, pool)
    if not options["methods"]:
        raise ValueError("a sweep needs --methods, such as sgd sam, or --recipes")
    methods = combined(options["methods"], options.pop("optimizer", None))
    preset = preset_of(options)
    runs = runs_of(methods, options["seeds"], grid, preset, options)
    evaluation = evaluation_of(next(iter(runs.values())).data, options)
    say_alpha(list(runs.values()), options | grid)
    out = options["out"] or Path("runs", f"sweep-{Path(preset).stem}")
    sweep(runs, list(grid), evaluation, out, pool, options["rows"], options["download"])


def run_study_command(options: dict[str, Any]) -> None:
    from bench.experiments.study import run_study, show

    name = options["name"]
    if options["show"]:
        training = ("rows", "out", "train_only", *(of.key for of in POOL))
        refuse_beside("show", training, options)
        show(name, options["show"], options["figure"])
    elif options["figure"]:
        raise ValueError("--figure is drawn from rows; add --show ROWS")
    else:
        out = options["out"] or Path("runs", f"study-{name}")
        pool = pool_of(options, jobs=2)
        run_study(name, out, pool, options["rows"], options["train_only"])


COMMANDS = (
    Command(
        "compare", "train several methods and seeds; repeat the command to resume it", run_compare,
        OfCompare, (*POOL, *CONFIG, *EVALUATION), FILLED,
    ),
    Command(
        "sweep", "train every method with every value of a grid; repeat the command to go on with "
        "it", run_sweep, OfSweep, (*POOL, *CONFIG, *EVALUATION), FILLED,
    ),
    Command(
        "study", "make a study of docs/studies.md again; repeat the command to go on with it",
        run_study_command, OfStudy, POOL,
    ),
)
