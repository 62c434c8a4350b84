"""A study: a sweep whose settings lie in bench/studies/NAME.json, its table and its figure."""

import json
from pathlib import Path
from typing import Any

from bench.config import Config, resolve_evaluation
from bench.groups import read_runs, sections_of
from bench.record import write_text
from bench.sweep import by_setting, runs_of, sweep, table

STUDIES = Path(__file__).parent / "studies"


def load_study(name: str) -> dict[str, Any]:
    """Return question, preset, methods, seeds, grid, options and evaluation of a study, and its
    figure where that is not one of accuracies against the grid."""
    path = STUDIES / f"{name}.json"
    known = sorted(p.stem for p in STUDIES.glob("*.json"))
    if name not in known:
        raise ValueError(f"unknown study {name!r}; choose from {', '.join(known)}")
    return json.loads(path.read_text())


def study_runs(study: dict[str, Any]) -> dict[str, Config]:
    return runs_of(
        study["methods"], study["seeds"], study["grid"], study["preset"], study["options"]
    )


def draw(study: dict[str, Any], summaries: list[dict[str, Any]], path: Path) -> None:
    """Draw robust against natural accuracy where the study asks for the "trade-off"; else
    accuracies against the one value that differs, or against the attack's radius."""
    from bench import plots

    if study.get("figure") == "trade-off":
        groups = [group for section in sections_of(summaries) for group in section.groups]
        return plots.plot_trade_off([g.last for g in groups], [g.best for g in groups], {}, path)
    rows = by_setting(summaries, list(study["grid"]))
    (name, *_) = [*rows[0]["setting"], None]
    if name is None:
        return plots.plot_eps(rows, path)
    series: dict[str, list] = {}
    for row in rows:
        if row["setting"][name] is not None:
            series.setdefault(row["method"], []).append((row["setting"][name], row))
    level = [row for row in rows if row["setting"][name] is None]
    return plots.plot_rho(series, level, path, name.replace("_", " "))


def show(name: str, rows_path: Path, figure: Path | None) -> list[dict[str, Any]]:
    """Print the table of a study's rows, and draw its figure; nothing is trained.

    Raises ValueError where rows are missing or of other settings than the study's.
    """
    study = load_study(name)
    summaries = read_runs([rows_path])[0]
    wanted = {(c.method, c.seed, *(getattr(c, k) for k in study["grid"]))
              for c in study_runs(study).values()}  # fmt: skip
    held = {(s["method"], s["config"]["seed"], *(s["config"][k] for k in study["grid"]))
            for s in summaries}  # fmt: skip
    if held != wanted or len(summaries) != len(wanted):
        raise ValueError(
            f"{str(rows_path)!r} does not hold each of the study's {len(wanted)} runs once; make "
            f"them with `python -m bench study {name} --rows FILE`"
        )
    rows = by_setting(summaries, list(study["grid"]))
    print(table(rows))
    if figure is not None:
        draw(study, summaries, figure)
        print(f"\nwrote {figure}")
    return rows


def run_study(name: str, out: Path, jobs: int, rows_path: Path | None) -> list[dict[str, Any]]:
    """Make the study's runs that `out` does not hold finished; write its table and figure there."""
    study = load_study(name)
    runs = study_runs(study)
    radii = {norm: tuple(k / 255 for k in study["evaluation"][norm]) for norm in ("linf", "l2")}
    (data,) = {config.data for config in runs.values()}
    evaluation = resolve_evaluation(data, radii)
    print(study["question"])
    rows = sweep(runs, list(study["grid"]), evaluation, out, jobs, rows_path)
    draw(study, read_runs([out / run for run in runs])[0], out / "figure.png")
    write_text(out / "question.txt", study["question"] + "\n")
    return rows
