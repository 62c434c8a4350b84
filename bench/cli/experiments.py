"""`bench compare`, `sweep` and `study`: many runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli.parse import Command
from bench.cli.shared import CONFIG, EVALUATION, FILLED, METHODS, OfRuns, evaluation_of, say_alpha
from bench.settings.recipes import STUDIES, names_in
from bench.settings.setting import MISSING, setting


@dataclass(kw_only=True)
class OfMany(OfRuns):
    seeds: tuple[int, ...] = setting((0, 1, 2), "a run each", metavar="SEED...")
    jobs: int = setting(1, "runs at a time", bounds="[1, inf)")
    rows: Path | None = setting(None, "append a row a run to this JSONL", metavar="FILE")


@dataclass(kw_only=True)
class OfCompare(OfMany):
    methods: tuple[str, ...] = setting(
        ("sgd", "sam", "fsam", "at-linf"), f"of {METHODS}", metavar="METHOD..."
    )
    demo: bool = setting(
        False, "a few minutes on two CPU cores: --preset digits --seeds 0 1 --jobs 2 --threads 1"
    )
    out: Path | None = setting(None, "the runs' directory", default="runs/PRESET", metavar="DIR")


@dataclass(kw_only=True)
class OfSweep(OfMany):
    methods: tuple[str, ...] = setting(MISSING, f"of {METHODS}", metavar="METHOD...")
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
    jobs: int = setting(2, "runs at a time, a thread each", bounds="[1, inf)")
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


def combined(methods: list[str], optimizer: str | None) -> list[str]:
    """Return a comparison's methods with its --optimizer in those that name none."""
    from bench.settings.methods import ADVERSARIES, method_of

    open_ones = {*ADVERSARIES, "standard"} & set(methods)
    if optimizer is not None and not open_ones:
        raise ValueError(
            f"optimizer {optimizer!r} has no effect on {', '.join(methods)}, which name theirs"
        )
    return [method_of(m, optimizer if m in open_ones else None) for m in methods]


def run_compare(options: dict[str, Any]) -> None:
    from bench.experiments.compare import compare
    from bench.settings.config import check_used, preset_of, resolve

    if options["demo"]:
        options |= {"preset": "digits", "seeds": [0, 1], "jobs": 2, "threads": 1}
    methods = combined(options["methods"], options.pop("optimizer", None))
    check_used(methods, options)
    by_seed = [
        [resolve(m, preset_of(options), options | {"seed": seed}) for m in methods]
        for seed in options["seeds"]
    ]
    evaluation = evaluation_of(by_seed[0][0].data, options)
    out = options["out"] or Path("runs", preset_of(options))
    say_alpha(by_seed[0], options)
    compare(by_seed, evaluation, out, options["jobs"], options["rows"], options["download"])


def run_sweep(options: dict[str, Any]) -> None:
    from bench.experiments.sweep import parse_grid, runs_of, sweep
    from bench.settings.config import preset_of

    methods = combined(options["methods"], options.pop("optimizer", None))
    grid = parse_grid(options["grid"], options)
    preset = preset_of(options)
    runs = runs_of(methods, options["seeds"], grid, preset, options)
    evaluation = evaluation_of(next(iter(runs.values())).data, options)
    say_alpha(list(runs.values()), options | grid)
    out = options["out"] or Path("runs", f"sweep-{Path(preset).stem}")
    sweep(runs, list(grid), evaluation, out, options["jobs"], options["rows"], options["download"])


def run_study_command(options: dict[str, Any]) -> None:
    from bench.experiments.study import run_study, show

    name = options["name"]
    if options["show"]:
        show(name, options["show"], options["figure"])
    elif options["figure"]:
        raise ValueError("--figure is drawn from rows; add --show ROWS")
    else:
        out = options["out"] or Path("runs", f"study-{name}")
        run_study(name, out, options["jobs"], options["rows"], options["train_only"])


COMMANDS = (
    Command(
        "compare", "train several methods and seeds; repeat the command to resume it", run_compare,
        OfCompare, (*CONFIG, *EVALUATION), FILLED,
    ),
    Command(
        "sweep", "train every method with every value of a grid; repeat the command to go on with "
        "it", run_sweep, OfSweep, (*CONFIG, *EVALUATION), FILLED,
    ),
    Command(
        "study", "make a study of docs/studies.md again; repeat the command to go on with it",
        run_study_command, OfStudy,
    ),
)
