"""Train and attack several methods over several seeds; one summary, one table, two plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.attacks.by_name import IN_BF16
from bench.attacks.notation import eps_key, in_both_forms, labelled
from bench.attacks.objectives import FIRST, LAST, in_words
from bench.evaluation.evaluate import NORM_NAMES
from bench.experiments.pool import run_all
from bench.files import (
    alone_in,
    append_jsonl,
    refuse_unwritable,
    remove_unfinished,
    write_json,
    write_text,
)
from bench.reports.statistics import aggregate, warned
from bench.reports.tables import markdown
from bench.settings.config import SETTINGS, Config
from bench.settings.evaluation import Evaluation
from bench.settings.names import method_name
from bench.settings.pool import Pool


def table(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table; accuracies in %, mean ± std over the seeds."""
    columns = [(norm, eps) for norm, by_eps in rows[0]["robust"].items() for eps in by_eps]
    names = [f"{NORM_NAMES[norm]} {labelled(eps)}" for norm, eps in columns]
    head = ["method", "natural", *names, "images/s", "cost"]
    several = len(rows[0]["seeds"]) > 1

    def cell(mean: float, std: float) -> str:
        return f"{100 * mean:.1f} ± {100 * std:.1f}" if several else f"{100 * mean:.1f}"

    lines = []
    for row in rows:
        accuracies = [cell(row["natural"], row["natural_std"])]
        accuracies += [cell(row["robust"][n][e], row["robust_std"][n][e]) for n, e in columns]
        cost = [f"{row['images_per_second']:.0f}", f"{row['relative_cost']:.1f}x"]
        lines.append([method_name(row["method"]), *accuracies, *cost])
    return markdown(head, lines, left=1)


def settings(config: dict[str, Any], among: Sequence[dict[str, Any]] = ()) -> str:
    """Return what one method was trained with and the others were not.

    among: all methods' configs; whatever differs between them is told.
    """
    told = {k: of.value for k, of in SETTINGS.items() if of.told}
    own = {k: config[k] for k, value in told.items() if config.get(k, value) != value}
    own |= {k: config[k] for k in differing(among) if config.get(k) is not None}
    own |= {k: eps_key(own[k]) for k in ("eps", "alpha") if k in own}
    return ", ".join(f"{k} {v}" for k, v in own.items())


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the settings in which configs differ, beside the method and the seed."""
    names = dict.fromkeys(k for config in configs for k in config)
    return [k for k in names if k not in ("method", "seed", "recipe")
            and any(c.get(k) != configs[0].get(k) for c in configs)]  # fmt: skip


def caption(rows: list[dict[str, Any]]) -> str:
    """Return what the table's numbers are: data, model, attacks, seeds, device, all settings in
    which the methods differ, and what the evaluations warned of."""
    config, evaluation = rows[0]["config"], rows[0]["evaluation"]
    configs = [row["config"] for row in rows]
    apart = differing(configs)
    methods = "; ".join(f"{method_name(c['method'])} {settings(c, configs)}".strip()
                        for c in configs)  # fmt: skip
    common = {"model": f"{config['model']}", "width": f"width {config['width']}",
              "epochs": f"{config['epochs']} epochs"}  # fmt: skip
    network = ", ".join(text for k, text in common.items() if k not in apart)
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    radii = {norm: [labelled(eps_key(e)) for e in evaluation[norm]] for norm in NORM_NAMES}
    passes = IN_BF16 if evaluation.get("precision") == "bf16" else ""
    warnings = [f"\n{text}" for row in rows
                for text in warned(method_name(row["config"]["method"]), row)]  # fmt: skip
    return (
        f"{judged_accuracy(rows[0])} of {config['data']}, {network}, "
        f"last checkpoint, seeds {', '.join(map(str, rows[0]['seeds']))}; {devices}.\n"
        f"Methods: {in_both_forms(methods)}.\n"
        f"Attacks: PGD-{evaluation['steps']}, random start, 1 restart, "
        f"{in_words(FIRST, LAST)}{passes}; "
        "model.eval(), images in [0, 1]; "
        f"l_inf {', '.join(radii['linf'])} with alpha eps/4, l2 {', '.join(radii['l2'])} "
        "with alpha eps/8.\nCost: training time per image, relative to the cheapest method."
        + "".join(warnings)
    )


def judged_accuracy(row: dict[str, Any]) -> str:
    """Return of which images the accuracy is that a row has."""
    evaluation, n = row["evaluation"], row["test_images"]
    if evaluation.get("on", "test") == "held-out":
        return f"Accuracy in % on {n} images held out of the training images"
    if evaluation.get("data"):
        return f"Test accuracy in % on {n} images of {evaluation['data']}, after training on those"
    return f"Test accuracy in % on {n} images"


def write_outputs(rows: list[dict[str, Any]], out: Path) -> list[Path]:
    """Write summary.json, table.md and the two plots; return their paths."""
    from bench.reports.figures import plot_cost, plot_eps

    fastest = max(row["images_per_second"] for row in rows)
    for row in rows:
        row["relative_cost"] = fastest / row["images_per_second"]
        share = row["images_per_second_std"] / row["images_per_second"]
        row["relative_cost_std"] = row["relative_cost"] * share
    names = ("summary.json", "table.md", "accuracy-eps.png", "accuracy-cost.png")
    paths = [out / name for name in names]
    with alone_in(out, wait=True):
        remove_unfinished(out)
        write_json(paths[0], rows)
        write_text(paths[1], f"{table(rows)}\n\n{caption(rows)}\n")
        plot_eps(rows, paths[2])
        plot_cost(rows, paths[3])
    return paths


def append_rows(path: Path | None, summaries: list[dict[str, Any]]) -> list[Path]:
    """Append the rows that the file does not hold yet; return the paths written."""
    if path is None:
        return []
    append_jsonl(path, summaries)
    return [path]


def compare(
    by_seed: list[list[Config]],
    evaluation: Evaluation,
    out: Path,
    pool: Pool,
    rows_path: Path | None = None,
    download: bool = False,
) -> list[dict[str, Any]]:
    """Run every method of the first seed, then of the next; write, print and return the result.

    by_seed: one list of configs a seed. rows_path: a JSONL file to append one row a run to. The
    rest is as in run_all.
    """
    refuse_unwritable(rows_path)
    runs = {config.name: (config, {"summary.json": evaluation})
            for of_seed in by_seed for config in of_seed}  # fmt: skip
    made = run_all(runs, out, pool, download=download)
    summaries = [summary for (summary,) in made.values()]
    methods = [config.method for config in by_seed[0]]
    rows = [aggregate(m, [s for s in summaries if s["method"] == m]) for m in methods]
    paths = write_outputs(rows, out)
    paths += append_rows(rows_path, summaries)
    print(f"\n{table(rows)}\n\n{caption(rows)}\n")
    print("\n".join(f"wrote {path}" for path in paths))
    return rows
