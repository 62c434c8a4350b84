"""Tables, figures and one page from finished runs: `python -m bench report DIR...`."""

import re
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.attacks.notation import labelled
from bench.evaluation.evaluate import NORM_NAMES
from bench.files import alone_in, remove_unfinished, write_text
from bench.reports import figures as drawing
from bench.reports.figures import accuracies
from bench.reports.groups import (
    Group,
    Section,
    command,
    deviations,
    identity,
    known_recipe,
    other_images,
    published,
    read_runs,
    recipe_of,
    sections_of,
    shown,
)
from bench.reports.html import page
from bench.reports.statistics import warned
from bench.reports.tables import csv_text, latex, markdown
from bench.settings.config import USED_BY

GROUPS_A_PAGE = 15  # of three lines each; a LaTeX table cannot break over pages


def heading(name: str) -> str:
    """ "linf 8/255" -> "l_inf 8/255 (0.0314)" """
    norm, _, eps = name.partition(" ")
    return f"{NORM_NAMES[norm]} {labelled(eps)}" if eps else name


def head_of(section: Section) -> list[str]:
    names = map(heading, accuracies(section.groups[0].last))
    return ["method", "checkpoint", *names, "seeds", "images/s", "training, s"]


def lines_of(group: Group) -> list[list[str]]:
    """Return the group's lines: accuracies in % at the last and at the best checkpoint, mean ± std
    over the seeds, and what the paper reports."""
    several = len(group.runs) > 1

    def cell(mean: float, std: float) -> str:
        digits = 0 if mean > 100 else 1
        return f"{mean:.{digits}f}" + f" ± {std:.{digits}f}" * several

    lines = []
    for name, row in (("last", group.last), ("best", group.best)):
        numbers = [cell(*pair) for pair in accuracies(row).values()]
        cost = [f"{row['images_per_second']:.0f}",
                cell(row["train_seconds"], row["train_seconds_std"])]  # fmt: skip
        lines.append([group.label, name, *numbers, str(len(group.runs)), *cost])
    if paper := published(group):
        std = f" ± {paper['std']:g}" if "std" in paper else ""
        values = [f"{float(paper[k])}{std if k == 'natural' else ''}" if k in paper else ""
                  for k in accuracies(group.last)]  # fmt: skip
        star = "*" if deviations(group) else ""
        lines.append([group.label, "paper" + star, *values, "", "", ""])
    return lines


def notes(section: Section) -> list[str]:
    """Return what the section's numbers are, a sentence or a line each."""
    shared = set.intersection(*({identity(k, v) for k, v in g.config.items()}
                                for g in section.groups))  # fmt: skip
    config = section.groups[0].config
    common = ", ".join(f"{k} {config[k]}" for k in ("model", "width", "epochs", "batch_size", "lr")
                       if identity(k, config[k]) in shared)  # fmt: skip
    several = any(len(group.runs) > 1 for group in section.groups)
    on = section.groups[0].runs[0]["evaluation"].get("on", "test")
    lines = [
        f"{'Accuracy' if on == 'held-out' else 'Test accuracy'} in % on {section.title}"
        + ", mean ± sample standard deviation over the seeds" * several + ".",
        f"Last: after the last epoch; best: {best_epoch(section)}.",
        "Training time is that of the training epochs alone, whatever else the machine did.",
    ]
    devices = dict.fromkeys(run["device"] for group in section.groups for run in group.runs)
    if len(devices) > 1:
        lines.append(f"Times come from several devices: {'; '.join(devices)}.")
    lines += other_images(section)
    lines += [f"All with {common}."] * bool(common)
    if any(g.config["eps"] is not None and g.histories for g in section.groups):
        lines.append("Validation accuracy of adversarial training is under its own attack.")
    for group in section.groups:
        if recipe_of(group) and not known_recipe(group):
            lines.append(f"{group.label}: the recipe {recipe_of(group)!r} is not known here.")
        if published(group) and (changed := deviations(group)):
            lines.append(f"paper*: {group.label} differs from its recipe in {changed}.")
        lines += warnings_of(group)
    return lines


def best_epoch(section: Section) -> str:
    held_out = [group.config["val"] > 0 for group in section.groups]
    if not any(held_out):
        return "the same, for no image was held out to choose by"
    chosen = "after the epoch of the highest validation accuracy"
    return chosen if all(held_out) else f"{chosen}, or the last where no image was held out"


def warnings_of(group: Group) -> list[str]:
    """Return what the evaluations of the last checkpoints warned of, then what those of the best
    ones did beside it."""
    last, best = group.last["warnings"], group.best["warnings"]
    beside = {text: seeds for text, seeds in best.items() if text not in last}
    return warned(group.label, group.last) + warned(
        f"{group.label}, best checkpoint", {"warnings": beside}
    )


def attack_lines(section: Section) -> list[str]:
    return [text for by_eps in section.attacks.values() for text in by_eps.values()]


def attacks_in_short(section: Section) -> str:
    """Return the attacks without norm, eps and alpha."""
    pattern = r", (linf|l2), eps [^,]+(, alpha [^,]+)?"
    return "; ".join(dict.fromkeys(re.sub(pattern, "", text) for text in attack_lines(section)))


def records(section: Section) -> list[dict[str, Any]]:
    """Return the section's table as objects of plain numbers, one a line of it."""
    rows = []
    for group in section.groups:
        of_both = {"data": group.config["data"], "test_images": group.runs[0]["test_images"],
                   "attacks": attacks_in_short(section),
                   "method": group.config["method"], "setting": group.label}  # fmt: skip
        more = {"seeds": " ".join(map(str, group.seeds)),
                "images_per_second": group.last["images_per_second"],
                "train_seconds": group.last["train_seconds"]}  # fmt: skip
        for name, row in (("last", group.last), ("best", group.best)):
            values = {}
            for k, (mean, std) in accuracies(row).items():
                values |= {k: mean, f"{k} std": std if len(group.runs) > 1 else ""}
            rows.append(of_both | {"checkpoint": name} | values | more)
        if paper := published(group):
            names = {"std": "natural std"}
            values = {names.get(k, k): v for k, v in paper.items()}
            rows.append(of_both | {"checkpoint": "paper"} | values | {"seeds": ""})
    return rows


def csv_of(sections: list[Section]) -> str:
    rows = [row for section in sections for row in records(section)]
    head = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(head, [[row.get(key, "") for key in head] for row in rows])


def markdown_of(section: Section) -> str:
    lines = [line for group in section.groups for line in lines_of(group)]
    attacks = "\n".join(f"- {text}" for text in attack_lines(section))
    return "\n\n".join([f"### {section.title}", markdown(head_of(section), lines),
                        *notes(section), f"Attacks, model.eval():\n\n{attacks}"])  # fmt: skip


def latex_of(section: Section) -> str:
    """Return the table, in parts where it is long, after the attacks in full as comments; the
    notes below have them in short."""
    head = [re.sub(r"/255 .*", "", name) for name in head_of(section)]
    radii = ", ".join(dict.fromkeys(labelled(eps) for by in section.attacks.values() for eps in by))
    attacks = f"Attacks, radii in 255ths: {attacks_in_short(section) or 'none'}."
    attacks = f"Radii {radii}. " * bool(radii) + attacks
    tables = []
    for i in range(0, len(section.groups), GROUPS_A_PAGE):
        part = Section(section.title, section.groups[i : i + GROUPS_A_PAGE])
        lines = [line for group in part.groups for line in lines_of(group)]
        caption, *others = notes(part)
        if i > 0:
            caption = caption.removesuffix(".") + ", continued."
        tables.append(latex(head, lines, caption, " ".join([*others, attacks])))
    comments = "".join(f"% {text}\n" for text in attack_lines(section))
    text = comments + "\n\n".join(tables)
    return text.replace(r"l\_inf", r"$\ell_\infty$").replace("& l2 ", r"& $\ell_2$ ")


# ---- figures


def by_rho(section: Section) -> tuple[dict[str, list[tuple[float, dict[str, Any]]]], list[Group]]:
    """Return label -> (rho, means) by rho, for the settings that ran with several rhos, and the
    groups of plain SGD that such a setting has beside it."""
    alike: dict[str, list[Group]] = {}
    for group in section.groups:
        if group.config["rho"] is not None:
            key = identity(group.config | {"seed": None, "recipe": None, "rho": None})
            alike.setdefault(key, []).append(group)
    series, settings = {}, set()
    for groups in alike.values():
        if len(groups) > 1:
            label = re.sub(r" rho [^,]+,|,? rho [^,]+", "", groups[0].label)
            series[label] = [(g.config["rho"], g.last) for g in groups]
            settings.add(common_setting(groups[0]))
    plain = [g for g in section.groups if g.config["method"] == "sgd"]
    return series, [g for g in plain if common_setting(g) in settings]


def common_setting(group: Group) -> str:
    """Return what methods share: epochs, but not rho."""
    own = USED_BY.keys() | {"method", "recipe", "seed"}
    return identity({k: v for k, v in group.config.items() if k not in own})


def draw(section: Section, out: Path, prefix: str) -> dict[str, Path]:
    """Write the section's figures; return title -> path of those that its runs have data for."""
    groups = section.groups
    last, best = [g.last for g in groups], [g.best for g in groups]
    histories = {g.label: g.histories for g in groups if g.histories}
    papers = {g.label: published(g) for g in groups if published(g)}
    figures: dict[str, Path] = {}

    def path(title: str, name: str) -> Path:
        figures[title] = out / f"{prefix}-{name}.png"
        return figures[title]

    if histories:
        drawing.plot_curves(histories, path("Training curves", "curves"))
    if any(section.attacks.values()):
        drawing.plot_eps(last, path("Accuracy against eps", "accuracy-eps"))
        drawing.plot_trade_off(last, best, papers, path("Natural against robust", "trade-off"))
    series, plain = by_rho(section)
    if series:
        drawing.plot_rho(series, [g.last for g in plain], path("Sensitivity to rho", "rho"))
    drawing.plot_time(last, histories, path("Accuracy against wall-clock", "wall-clock"))
    return figures


def prefixes(sections: list[Section]) -> list[str]:
    """Return a file-name part a section: its data's name, numbered where there are several."""
    names = [Path(section.groups[0].config["data"]).name for section in sections]
    names = [re.sub(r"\W+", "-", name).strip("-") or "data" for name in names]
    return [f"{name}-{names[: i + 1].count(name)}" if names.count(name) > 1 else name
            for i, name in enumerate(names)]  # fmt: skip


def titles(sections: list[Section]) -> list[str]:
    """Return the sections' titles; where several are equal, each with its figures' prefix."""
    same = [section.title for section in sections]
    return [f"{title} ({prefix})" if same.count(title) > 1 else title
            for title, prefix in zip(same, prefixes(sections), strict=True)]  # fmt: skip


# ---- provenance, the command


def settings(group: Group) -> dict[str, str]:
    """Return the configuration that the group's runs share, without what is not used."""
    values = {k: v for k, v in group.config.items() if v is not None and k != "seed"}
    return {k: shown(k, v) for k, v in values.items()}


def provenance(group: Group) -> dict[str, str]:
    """Return where the group's runs come from, in words."""

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(run.get(key)) for run in group.runs))

    versions = {f"{k} {v}": None for run in group.runs for k, v in run["versions"].items() if v}
    return {
        "seeds": ", ".join(map(str, group.seeds)), "device": all_of("device"),
        "versions": ", ".join(versions), "git": all_of("git"), "finished": all_of("time"),
        "training": f"{fmean(run['train_seconds'] for run in group.runs):.0f} s a run",
        "recipe": recipe_of(group) or "none", "command": command(group),
    }  # fmt: skip


def report_runs(paths: list[Path], out: Path) -> list[Path]:
    """Write table.md, table.csv, table.tex, the figures and report.html from the runs in `paths`
    to `out`, print the tables, and return the files' paths. Raises ValueError as `read_runs`."""
    rows, unfinished = read_runs(paths)
    sections = sections_of(rows)
    for section, title in zip(sections, titles(sections), strict=True):
        section.title = title
    text = "\n\n".join(map(markdown_of, sections))
    with alone_in(out, wait=True):
        remove_unfinished(out)
        written = write_report(sections, text, out)
    print(text + "\n")
    print("".join(f"not finished, left out: {folder}\n" for folder in unfinished), end="")
    print("\n".join(f"wrote {path}" for path in written))
    return written


def write_report(sections: list[Section], text: str, out: Path) -> list[Path]:
    """Write the report's files, the page that holds all of it last; return their paths."""
    written = [out / name for name in ("table.md", "table.csv", "table.tex")]
    write_text(written[0], text + "\n")
    write_text(written[1], csv_of(sections))
    tables = "\n\n".join(map(latex_of, sections))
    write_text(written[2], f"% \\usepackage{{booktabs,graphicx}}\n{tables}\n")
    parts = []
    for section, prefix in zip(sections, prefixes(sections), strict=True):
        figures = draw(section, out, prefix)
        written += figures.values()
        parts.append({
            "title": section.title, "head": head_of(section), "notes": notes(section),
            "lines": [lines_of(group) for group in section.groups],
            "attacks": attack_lines(section), "figures": figures,
            "groups": [{"label": g.label, "config": settings(g), "provenance": provenance(g)}
                       for g in section.groups],
        })  # fmt: skip
    written.append(out / "report.html")
    write_text(written[-1], page(parts))
    return written
