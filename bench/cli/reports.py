"""`bench report`, `export` and `theory`: what is made of runs and of numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli.parse import Command
from bench.settings.setting import MISSING, setting


@dataclass(kw_only=True)
class OfReport:
    runs: tuple[Path, ...] = setting(
        (), "directories of runs, or JSONL of `bench compare --rows`", positional=True,
        metavar="DIR", may_be_empty=True,
    )
    step: tuple[Path, ...] | None = setting(
        None, "instead: JSONL files of `bench step --rows`", metavar="FILE..."
    )
    out: Path = setting(Path("runs/report"), "the report's directory", metavar="DIR")


@dataclass(kw_only=True)
class OfExport:
    run: Path = setting(MISSING, "a finished run's directory", positional=True, metavar="RUN")
    out: Path = setting(MISSING, "the directory to write to", positional=True, metavar="OUT")
    checkpoint: str = setting("last", "whose weights", choices=("last", "best"))


@dataclass(kw_only=True)
class OfTheory:
    p: float | None = setting(
        None, "how often the robust feature is right; without any option but --out, six models, "
        "else p 0.95, eta 0.2, n 100 unless given",
    )
    eta: float | None = setting(None, "the weak features' mean")
    n: int | None = setting(None, "the number of weak features")
    eps: tuple[float, ...] | None = setting(
        None, "radii of AT, in units of inputs", metavar="EPS..."
    )
    rho: tuple[float, ...] | None = setting(
        None, "radii of SAM, in units of weights", metavar="RHO..."
    )
    out: Path = setting(Path("runs/theory"), "the report's directory", metavar="DIR")


def run_report(options: dict[str, Any]) -> None:
    from bench.reports.runs import report_runs
    from bench.speed.step_report import report_steps

    if bool(options["runs"]) == bool(options["step"]):
        raise ValueError("pass directories of runs (report DIR...), or --step FILE..., one of them")
    if options["step"]:
        report_steps(options["step"], options["out"])
    else:
        report_runs(options["runs"], options["out"])


def run_export(options: dict[str, Any]) -> None:
    from bench.reports.export import export

    for path in export(options["run"], options["out"], options["checkpoint"]):
        print(f"wrote {path}")


def run_theory(options: dict[str, Any]) -> None:
    from bench.theory.report import SETTINGS, Model, theory

    given = {k: options[k] for k in ("p", "eta", "n") if options[k] is not None}
    own = given or options["eps"] or options["rho"]
    models = [Model(**({"p": 0.95, "eta": 0.2, "n": 100} | given))] if own else SETTINGS
    theory(models, options["eps"], options["rho"], options["out"])


COMMANDS = (
    Command(
        "report", "tables, figures and one HTML page from what runs or benchmarks left",
        run_report, OfReport,
    ),
    Command(
        "export", "a finished run's network for others: safetensors, its source, a model card",
        run_export, OfExport,
    ),
    Command(
        "theory", "the SAM/AT paper's binary model: what of its theory is exact, and what is not",
        run_theory, OfTheory,
    ),
)
