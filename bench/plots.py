"""The comparison's two figures: accuracy against eps, and accuracy against training cost."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from bench.record import replacing  # noqa: E402


def radius(eps: str) -> float:
    """ "8/255" -> 8.0"""
    return float(eps.removesuffix("/255"))


def save(figure: plt.Figure, path: Path) -> None:
    with replacing(path) as tmp:
        figure.savefig(tmp, format="png", dpi=150)
    plt.close(figure)


def plot_eps(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against the attack's radius, a panel a norm, a line a method, bars one std."""
    labels = (r"$\ell_\infty$", r"$\ell_2$")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for panel, norm, label in zip(panels, ("linf", "l2"), labels, strict=True):
        for row in rows:
            by_eps = {0.0: (row["natural"], row["natural_std"])} | {
                radius(eps): (accuracy, row["robust_std"][norm][eps])
                for eps, accuracy in row["robust"][norm].items()
            }
            mean, std = zip(*(by_eps[eps] for eps in sorted(by_eps)), strict=True)
            panel.errorbar(
                sorted(by_eps), [100 * m for m in mean], [100 * s for s in std],
                marker="o", markersize=3, capsize=2, label=row["method"],
            )  # fmt: skip
        panel.set_xlabel(f"{label} attack radius eps, in 255ths (0: natural)")
        panel.set_xscale("symlog", base=2, linthresh=1)
        ticks = sorted({0.0} | {radius(eps) for row in rows for eps in row["robust"][norm]})
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend()
    save(figure, path)


def plot_cost(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw natural and smallest- and largest-l_inf robust accuracy against relative time."""
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    radii = sorted(rows[0]["robust"]["linf"], key=radius)
    shown = dict.fromkeys(radii[:1] + radii[-1:])
    for i, row in enumerate(rows):
        accuracies = [row["natural"], *(row["robust"]["linf"][eps] for eps in shown)]
        for accuracy, marker in zip(accuracies, "os^"[: len(accuracies)], strict=True):
            panel.plot(row["relative_cost"], 100 * accuracy, marker, color=f"C{i}")
        panel.plot([], [], "o", color=f"C{i}", label=row["method"])
    panel.plot([], [], "o", color="gray", label="natural")
    for eps, marker in zip(shown, "s^"[: len(shown)], strict=True):
        panel.plot([], [], marker, color="gray", label=rf"$\ell_\infty$ {eps}")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.set_xlabel("training time per image, relative to the cheapest method")
    panel.set_ylabel("test accuracy, %")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save(figure, path)
