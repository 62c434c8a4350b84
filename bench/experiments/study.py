"""A study: a sweep set by recipes/studies/NAME.json; its tables, claims and figure."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.experiments.compare import append_rows
from bench.experiments.pool import run_all
from bench.experiments.sweep import by_setting, runs_of, shown, with_warnings
from bench.files import write_text
from bench.reports.claims import Claim, cost, judged
from bench.reports.groups import other_images, read_runs, sections_of
from bench.settings.config import MACHINE, Config, differences
from bench.settings.evaluation import Evaluation, resolve_evaluation
from bench.settings.names import method_name
from bench.settings.pool import Pool
from bench.settings.recipes import STUDIES, names_in
from bench.spelling import meant

Rows = list[dict[str, Any]]


def load_study(name: str) -> dict[str, Any]:
    """Return question, preset, methods, seeds, grid, options and evaluations of a study, its claims
    and hours if it has some, and its figure where that is not one of accuracies against the grid.
    Raises ValueError for an unknown name, and for claims about several settings of a method.
    """
    path = STUDIES / f"{name}.json"
    known = names_in(STUDIES)
    if name not in known:
        raise ValueError(
            f"unknown study {name!r}{meant(name, known)}; choose from {', '.join(known)}"
        )
    study = json.loads(path.read_text("utf-8"))
    if study.get("claims"):
        refuse_several_settings(name, study)
    return study


def refuse_several_settings(name: str, study: dict[str, Any]) -> None:
    """Raise ValueError where the grid gives a method several settings: a claim about the method
    would be of one of them."""
    found: dict[tuple[str, int], str] = {}
    for config in study_runs(study).values():
        values = ", ".join(f"{k} {shown(k, getattr(config, k))}" for k in study["grid"])
        text = f"{config.method} {values}"
        if (other := found.setdefault((config.method, config.seed), text)) != text:
            raise ValueError(
                f"the study {name!r} has claims, which are of methods, and a grid that makes "
                f"{other} and {text}; leave one value in it, or leave out the claims"
            )


def study_runs(study: dict[str, Any]) -> dict[str, Config]:
    return runs_of(
        study["methods"], study["seeds"], study["grid"], study["preset"], study["options"]
    )


def evaluations_of(study: dict[str, Any]) -> dict[str, Evaluation]:
    """Return the study's evaluations by name, radii in [0, 1]."""
    (data,) = {config.data for config in study_runs(study).values()}
    result = {}
    for name, values in study["evaluations"].items():
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        radii = {norm: tuple(k / 255 for k in values[norm]) for norm in ("linf", "l2")}
        result[name] = resolve_evaluation(data, given | radii)
    return result


def claims_of(study: dict[str, Any]) -> list[Claim]:
    return [Claim(**claim | {"at": tuple(claim["at"])}) for claim in study.get("claims", [])]


def draw(study: dict[str, Any], summaries: Rows, path: Path) -> None:
    """Draw robust against natural accuracy where the study asks for the "trade-off"; else
    accuracies against the one value that differs, or against the attack's radius."""
    from bench.reports import figures

    if study.get("figure") == "trade-off":
        groups = [group for section in sections_of(summaries) for group in section.groups]
        return figures.plot_trade_off([g.last for g in groups], [g.best for g in groups], {}, path)
    rows = by_setting(summaries, list(study["grid"]))
    (name, *_) = [*rows[0]["setting"], None]
    if name is None:
        return figures.plot_eps(rows, path)
    series: dict[str, list] = {}
    for row in rows:
        if row["setting"][name] is not None:
            series.setdefault(method_name(row["method"]), []).append((row["setting"][name], row))
    level = [row for row in rows if row["setting"][name] is None]
    return figures.plot_rho(series, level, path, name.replace("_", " "))


# ---- rows


def of_evaluation(summaries: Rows, evaluation: Evaluation) -> Rows:
    usual = asdict(Evaluation(linf=(), l2=()))  # what an older row does not say

    def text(values: dict[str, Any]) -> str:
        return json.dumps(usual | values, sort_keys=True)

    return [s for s in summaries if text(s["evaluation"]) == text(asdict(evaluation))]


def place_of(summary: dict[str, Any], runs: dict[str, Config]) -> str | None:
    """Return the name of the study's run that the row is of, None if it is of no such run."""
    ignored = dict.fromkeys(MACHINE - {"seed"}) | {"recipe": None}
    for name, config in runs.items():
        stored = asdict(config) | summary["config"]
        if not differences(stored | {k: getattr(config, k) for k in ignored}, config):
            return name
    return None


def sorted_rows(
    study: dict[str, Any], summaries: Rows
) -> tuple[dict[str, Rows], dict[str, list[str]]]:
    """Return by evaluation the study's rows, and its runs that have none.

    Raises ValueError for rows of other settings than the study's, or twice of one.
    """
    runs, by_name, missing, known = study_runs(study), {}, {}, 0
    for name, evaluation in evaluations_of(study).items():
        rows = of_evaluation(summaries, evaluation)
        places = [place_of(row, runs) for row in rows]
        if None in places:
            raise ValueError(f"a row of another setting: {strange(rows[places.index(None)], runs)}")
        if len(set(places)) < len(places):
            raise ValueError("one run twice")
        by_name[name], known = rows, known + len(rows)
        missing[name] = [run for run in runs if run not in places]
    if known < len(summaries):
        raise ValueError("a row of another evaluation")
    return by_name, missing


def strange(row: dict[str, Any], runs: dict[str, Config]) -> str:
    """Return what a row is of, and in what it differs from the study's run of that method and seed,
    if there is one."""
    seed = row["config"]["seed"]
    near = (c for c in runs.values() if (c.method, c.seed) == (row["method"], seed))
    changed = [differences(row["config"], config) for config in near][:1]
    return " ".join([row["method"], f"seed {seed}", *(f"({text})" for text in changed)])


def texts_of(
    study: dict[str, Any], by_name: dict[str, Rows], missing: dict[str, list[str]]
) -> str:
    """Return the study's tables, one an evaluation, then what its claims are worth by each."""
    grid, claims, parts = list(study["grid"]), claims_of(study), []
    for name, rows in by_name.items():
        if rows:
            parts += [f"{name}\n"] * (len(by_name) > 1) + [with_warnings(by_setting(rows, grid))]
            parts += [text for section in sections_of(rows) for text in other_images(section)]
    for name, rows in by_name.items():
        if rows and claims:
            parts += [f"The claims under {name}\n", judged(rows, claims)]
    if claims:
        parts.append(costs_of(study))
    parts += [f"not run under {name}: {', '.join(runs)}" for name, runs in missing.items() if runs]
    return "\n\n".join(part.strip("\n") for part in parts)


def costs_of(study: dict[str, Any]) -> str:
    """Return what each method's training costs, in passes, relative to the first method's. study:
    one with claims, in which a method has one setting."""
    by_method = {config.method: cost(config) for config in study_runs(study).values()}
    first = next(iter(by_method.values()))
    shares = {method: passes / first for method, passes in by_method.items()}
    return "Passes over the images, relative to " + ", ".join(
        f"{method_name(method)} {'unknown' if math.isnan(share) else f'{share:.2f}'}"
        for method, share in shares.items()
    )


def show(name: str, rows_path: Path, figure: Path | None) -> Rows:
    """Print the tables and claims of a study's rows, and draw its figure; nothing is trained.

    Raises ValueError where rows are of other settings than the study's or, unless it has claims,
    which may be of fewer runs, where some are missing.
    """
    study = load_study(name)
    summaries = read_runs([rows_path])[0]
    runs = len(study_runs(study)) * len(study["evaluations"])
    try:
        by_name, missing = sorted_rows(study, summaries)
        if any(missing.values()) and "claims" not in study:
            raise ValueError(f"{sum(map(len, missing.values()))} are missing")
    except ValueError as e:
        raise ValueError(
            f"{str(rows_path)!r} does not hold each of the study's {runs} runs once ({e}); make "
            f"them with `python -m bench study {name} --rows FILE`"
        ) from e
    print(texts_of(study, by_name, missing))
    rows = next(rows for rows in by_name.values() if rows)
    if figure is not None:
        draw(study, rows, figure)
        print(f"\nwrote {figure}")
    return by_setting(rows, list(study["grid"]))


def run_study(
    name: str, out: Path, pool: Pool, rows_path: Path | None, train_only: bool = False
) -> None:
    """Make the study's runs that neither `out` nor the rows hold; write its tables and figure.

    rows_path: takes a row a run and evaluation as soon as a run ends; those that it holds already
    are not made again, wherever they were made. train_only: evaluate in a later call.
    """
    study = load_study(name)
    runs, evaluations = study_runs(study), evaluations_of(study)
    started = rows_path is not None and rows_path.exists() and rows_path.stat().st_size
    rows = read_runs([rows_path])[0] if started else []
    by_name, _ = sorted_rows(study, rows)
    held = {title: {place_of(row, runs) for row in by_name[title]} for title in evaluations}
    files = {title: f"summary-{i}.json" if i else "summary.json"
             for i, title in enumerate(evaluations)}  # fmt: skip
    left = {}
    for run, config in runs.items():
        open_ones = {files[title]: evaluation for title, evaluation in evaluations.items()
                     if run not in held[title]}  # fmt: skip
        if open_ones:
            left[run] = (config, {} if train_only else open_ones)
    hours = study.get("hours", "minutes")
    print(f"{study['question']}\n{len(left)} of {len(runs)} runs lack rows; all take {hours}")
    made = run_all(left, out, pool, lambda row: append_rows(rows_path, [row]))
    rows += [row for summaries in made.values() for row in summaries]
    if train_only:
        print(f"trained, in {out}; repeat without --train-only to evaluate")
        return
    by_name, missing = sorted_rows(study, rows)
    out.mkdir(parents=True, exist_ok=True)  # the rows may hold every run
    write_text(out / "question.txt", study["question"] + "\n")
    text = texts_of(study, by_name, missing)
    write_text(out / "table.md", text + "\n")
    draw(study, next(iter(by_name.values())), out / "figure.png")
    print(f"\n{text}\n\nwrote {out / 'table.md'}, {out / 'figure.png'}")
