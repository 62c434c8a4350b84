"""Figures of trained runs: curves, and accuracy against eps, cost, time, rho and natural accuracy.

A "row" is `bench.reports.statistics.aggregate`'s: means and deviations over the seeds of one
setting. Its "label", where it has one, tells it from others of its method.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from cycler import cycler  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

from bench.attacks.notation import labelled  # noqa: E402
from bench.files import replacing  # noqa: E402
from bench.settings.names import SIGNS, in_figures, method_name  # noqa: E402

NORM_LABELS = {"linf": SIGNS["l_inf"], "l2": SIGNS["l2"]}
FEW = 6  # lines that a legend inside a panel has room for
ROOM = 1.5  # inches beside the panels that figures have for a legend
# Okabe and Ito's colours, which the colour-blind tell apart, but its yellow, faint on white. Their
# number and those of line styles and markers have no common factor, so looks repeat late.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ((5, 2), (1, 1.5), (6, 2, 1, 2), (12, 2), (6, 2, 1, 2, 1, 2), (2, 4), (12, 2, 4, 2))
LINES, MARKERS = ("-", *((0, dashes) for dashes in DASHES)), "os^DvPX<>"
FILLS = ("full", "left", "none")  # natural, at the smallest and at the largest radius
plt.rcParams["axes.prop_cycle"] = cycler(color=COLOURS)
plt.rcParams["legend.handlelength"] = 4.0  # that a whole pattern of dashes is seen


def radius(eps: str) -> float:
    """ "8/255" -> 8.0"""
    return float(eps.removesuffix("/255"))


def accuracies(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return mean and deviation in % of an `aggregate`, by the names that recipes use: natural,
    then "linf 1/255" and so on."""
    result = {"natural": (100 * row["natural"], 100 * row["natural_std"])}
    for norm, by_eps in row["robust"].items():
        for eps in sorted(by_eps, key=radius):
            mean, std = by_eps[eps], row["robust_std"][norm][eps]
            result[f"{norm} {eps}"] = (100 * mean, 100 * std)
    return result


def save(figure: plt.Figure, path: Path) -> None:
    with replacing(path) as tmp:
        figure.savefig(tmp, format="png", dpi=150)
    plt.close(figure)


def style(i: int) -> dict[str, Any]:
    """Return the look of a picture's i-th line: no two of the first 8 share the line style, no two
    of the first 56 two of colour, line style and marker."""
    return {"color": COLOURS[i % 7], "linestyle": LINES[i % 8], "marker": MARKERS[i % 9]}


def point_style(i: int) -> dict[str, Any]:
    return style(i) | {"linestyle": "none"}


def label_of(row: dict[str, Any]) -> str:
    """Return a row's name in tables; `in_figures` of it is that in legends."""
    return row.get("label") or method_name(row["method"])


def legend_beside(figure: plt.Figure, handles: list[Any], labels: list[str]) -> None:
    """Put a legend beside the panels, and make the figure large enough to hold all of it."""
    box = figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    across, down = box.get_window_extent().size / figure.dpi
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + max(0, across - ROOM), max(height, down + 0.2))


def legend(figure: plt.Figure, panel: plt.Axes, lines: int) -> None:
    """Put the panel's legend inside it, or beside the panels where it is long."""
    if lines <= FEW:
        panel.legend(fontsize=8)
    else:
        legend_beside(figure, *panel.get_legend_handles_labels())


def panels(number: int, columns: int = 5) -> tuple[plt.Figure, list[plt.Axes]]:
    """Return a figure of so many panels, in even rows of at most `columns`."""
    down = math.ceil(number / columns)
    across = math.ceil(number / down)
    figure, grid = plt.subplots(
        down, across, squeeze=False, layout="constrained", figsize=(1.6 + 2.7 * across, 2.8 * down)
    )
    for panel in grid.flat[number:]:
        panel.remove()
    for panel in grid.flat[:number]:
        panel.grid(alpha=0.3)
    return figure, list(grid.flat[:number])


def pretty(name: str) -> str:
    """ "linf 8/255" -> both forms, with the norm's sign; "natural" stays."""
    norm, _, eps = name.partition(" ")
    return f"{NORM_LABELS[norm]} {labelled(eps)}" if eps else name


def plot_eps(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against the attack's radius, a panel a norm, a line a method, bars one std."""
    norms = [norm for norm in NORM_LABELS if rows[0]["robust"].get(norm)]
    wide = 9 if len(rows) <= FEW else 11
    figure, (axes,) = plt.subplots(
        1, len(norms), figsize=(wide, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, norm in zip(axes, norms, strict=True):
        for i, row in enumerate(rows):
            by_eps = {0.0: (row["natural"], row["natural_std"])} | {
                radius(eps): (accuracy, row["robust_std"][norm][eps])
                for eps, accuracy in row["robust"][norm].items()
            }
            mean, std = zip(*(by_eps[eps] for eps in sorted(by_eps)), strict=True)
            panel.errorbar(
                sorted(by_eps), [100 * m for m in mean], [100 * s for s in std], **style(i),
                markersize=4, capsize=2, label=in_figures(label_of(row)),
            )  # fmt: skip
        panel.set_xlabel(f"{NORM_LABELS[norm]} attack radius eps, in 255ths and as a number "
                         "(0: natural)")  # fmt: skip
        ticks = sorted({0.0} | {radius(eps) for row in rows for eps in row["robust"][norm]})
        panel.set_xscale("symlog", base=2, linthresh=ticks[1])
        panel.set_xticks(ticks, [f"{t:g}\n{t / 255:.2g}" for t in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    legend(figure, axes[0], len(rows))
    save(figure, path)


def draw_cost(panel: plt.Axes, rows: list[dict[str, Any]], against: str) -> None:
    """Draw natural and smallest- and largest-l_inf robust accuracy against row[against], bars one
    std of both where they are known."""
    radii = sorted(rows[0]["robust"].get("linf", {}), key=radius)
    shown = dict.fromkeys(["natural", *(f"linf {eps}" for eps in radii[:1] + radii[-1:])])
    for i, row in enumerate(rows):
        for name, fill in zip(shown, FILLS, strict=False):
            mean, std = accuracies(row)[name]
            panel.errorbar(row[against], mean, std or None, row.get(f"{against}_std") or None,
                           elinewidth=0.7, capsize=2, fillstyle=fill, **point_style(i))  # fmt: skip
        panel.plot([], [], label=in_figures(label_of(row)), **point_style(i))
    for name, fill in zip(shown, FILLS, strict=False):
        panel.plot([], [], "o", color="gray", fillstyle=fill, label=pretty(name))
    panel.set_ylabel("test accuracy, %")
    panel.grid(alpha=0.3)


def plot_cost(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracies against relative time."""
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    draw_cost(panel, rows, "relative_cost")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.set_xlabel("training time per image, relative to the cheapest method")
    panel.legend(fontsize=8)
    save(figure, path)


def apart(points: int, i: int) -> tuple[int, int]:
    """Return at which points the i-th of several long lines has its marker, as `markevery`."""
    every = max(1, points // 8)
    return i % every, every


def plot_curves(histories: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Draw loss, accuracies and learning rate against the epoch: a line a setting, the mean over
    its seeds; a band from the lowest to the highest.

    histories: setting -> a list a seed of its epochs' rows.
    """
    shown = {"train_loss": "training loss", "train_acc": "training accuracy, %",
             "val_acc": "validation accuracy, %", "lr": "learning rate"}  # fmt: skip
    figure, axes = panels(len(shown), columns=2)
    figure.set_size_inches(10, 6.5)
    for panel, (key, label) in zip(axes, shown.items(), strict=True):
        scale = 100 if key.endswith("acc") else 1
        for i, (name, seeds) in enumerate(histories.items()):
            epochs = list(zip(*seeds, strict=False))
            values = [[scale * row[key] for row in epoch if row.get(key) is not None]
                      for epoch in epochs]  # fmt: skip
            if not all(values):
                continue
            x = [epoch[0]["epoch"] + 1 for epoch in epochs]
            panel.plot(x, [fmean(v) for v in values], label=in_figures(name), markersize=4,
                       markevery=apart(len(x), i), **style(i))  # fmt: skip
            panel.fill_between(x, [min(v) for v in values], [max(v) for v in values],
                               color=style(i)["color"], alpha=0.15, linewidth=0)  # fmt: skip
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes[0], len(histories))
    save(figure, path)


def plot_trade_off(
    last: list[dict[str, Any]], best: list[dict[str, Any]],
    published: dict[str, dict[str, float]], path: Path,
) -> None:  # fmt: skip
    """Draw robust against natural accuracy, a panel a radius: the last checkpoint filled, with
    bars of one std; the best hollow; the paper's numbers as stars.

    published: label -> accuracies in %, by `accuracies`' names.
    """
    names = list(accuracies(last[0]))[1:]
    figure, axes = panels(len(names))
    for panel, name in zip(axes, names, strict=True):
        for i, (row, other) in enumerate(zip(last, best, strict=True)):
            (x, dx), (y, dy) = accuracies(row)["natural"], accuracies(row)[name]
            panel.errorbar(x, y, dy, dx, markersize=5, elinewidth=0.7, **point_style(i),
                           label=in_figures(label_of(row)))  # fmt: skip
            panel.plot(accuracies(other)["natural"][0], accuracies(other)[name][0],
                       fillstyle="none", markersize=7, **point_style(i))  # fmt: skip
            paper = published.get(label_of(row), {})
            if "natural" in paper and name in paper:
                draw_paper(panel, paper["natural"], paper[name], i)
        panel.set_title(f"robust at {pretty(name)}", fontsize=9)
        panel.margins(0.1)
    figure.supxlabel("natural test accuracy, %", fontsize=10)
    figure.supylabel("robust test accuracy, %", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    stars = [("*", "paper")] * bool(published)
    for marker, label in [("o", "best checkpoint"), *stars]:
        fill = "none" if marker == "o" else "full"
        handles.append(plt.Line2D([], [], marker=marker, color="gray", fillstyle=fill, linewidth=0))
        labels.append(label)
    legend_beside(figure, handles, labels)
    save(figure, path)


def draw_paper(panel: plt.Axes, x: float, y: float, i: int) -> None:
    """Draw a star in the i-th method's marker."""
    look = point_style(i)
    panel.plot(x, y, fillstyle="none", markersize=11, markeredgewidth=0.7, **look)
    panel.plot(x, y, "*", color=look["color"], markersize=5)


def plot_rho(
    series: dict[str, list[tuple[float, dict[str, Any]]]], flat: list[dict[str, Any]], path: Path,
    label: str = "rho",
) -> None:  # fmt: skip
    """Draw accuracies against rho, or what `label` says, a panel an attack, a line a method, bars
    one std.

    series: method -> (rho, row), by rho. flat: rows of methods without rho, drawn level.
    """
    first = next(iter(series.values()))[0][1]
    figure, axes = panels(len(accuracies(first)))
    for panel, name in zip(axes, accuracies(first), strict=True):
        for i, (method, points) in enumerate(series.items()):
            mean, std = zip(*(accuracies(row)[name] for _, row in points), strict=True)
            apart = 1 + 0.04 * (i - (len(series) - 1) / 2)  # so that bars do not hide each other
            rhos = [rho * apart for rho, _ in points]
            panel.errorbar(rhos, mean, std, markersize=4, capsize=2, label=in_figures(method),
                           **style(i))  # fmt: skip
        for j, row in enumerate(flat):
            panel.axhline(accuracies(row)[name][0], color="gray", label=in_figures(label_of(row)),
                          linestyle=style(len(series) + j)["linestyle"])  # fmt: skip
        ticks = sorted({rho for points in series.values() for rho, _ in points})
        if ticks[0] > 0:
            panel.set_xscale("log", base=2)
        else:
            panel.set_xscale("symlog", base=2, linthresh=ticks[1])
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
        panel.set_title(pretty(name), fontsize=9)
    figure.supxlabel(label, fontsize=10)
    figure.supylabel("test accuracy, %", fontsize=10)
    legend_beside(figure, *axes[0].get_legend_handles_labels())
    save(figure, path)


def plot_time(
    rows: list[dict[str, Any]], histories: dict[str, list[list[dict[str, Any]]]], path: Path
) -> None:
    """Draw accuracy against training time: the test's at the end and, from the histories, the
    validation's on the way, each the mean over the seeds."""
    figure, axes = panels(1 + bool(histories), columns=2)
    figure.set_size_inches(4.5 + 4.5 * len(axes), 4)
    order = {label_of(row): i for i, row in enumerate(rows)}
    for name, seeds in histories.items():
        epochs, seconds = list(zip(*seeds, strict=False)), 0.0
        x, y = [], []
        for epoch in epochs:
            seconds += fmean(row["seconds"] for row in epoch)
            values = [row["val_acc"] for row in epoch if row.get("val_acc") is not None]
            if values:
                x.append(seconds)
                y.append(100 * fmean(values))
        axes[0].plot(x, y, markersize=4, markevery=apart(len(x), order[name]),
                     **style(order[name]))  # fmt: skip
    if histories:
        axes[0].set_ylabel("validation accuracy, %")
    draw_cost(axes[-1], rows, "train_seconds")
    for panel in axes:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("training time, s")
    legend_beside(figure, *axes[-1].get_legend_handles_labels())
    save(figure, path)
