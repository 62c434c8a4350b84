"""The theory's figure: six panels on one binary model."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from bench.reports.figures import plt, save
from bench.theory import model as t
from bench.theory.model import Model


def plot_theory(m: Model, eps: float, rho: float, path: Path) -> None:
    """Draw the accuracies against w, AT's and SAM's optima against their radii, the relation of the
    radii, SAM's path at rho, and SAM's optimum for a ball over all weights."""
    figure, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    figure.suptitle(str(m))
    draw_accuracy(a, m, eps)
    draw_at(b, m)
    draw_sam(c, m)
    draw_relation(d, m)
    draw_paths(e, m, rho)
    draw_all_weights(f, m)
    for panel in (a, b, c, d, e, f):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    save(figure, path)


def radii(m: Model) -> np.ndarray:
    return np.geomspace(0.05, 0.9 * np.sqrt(m.n), 25)


def draw_accuracy(panel: Axes, m: Model, eps: float) -> None:
    w = np.linspace(0, 1.6 * t.w_at(m, eps), 300)
    for label, accuracies in (
        ("clean", t.accuracy(m, w)),
        (f"weak features attacked, eps {eps:.3g}", t.accuracy(m, w, eps)),
        ("x_1 attacked too", t.accuracy(m, w, eps, attack_x1=True)),
    ):
        panel.plot(w, 100 * accuracies, label=label)
    panel.axvline(t.w_st(m), color="C0", linestyle=":", label="w_ST")
    panel.axvline(t.w_at(m, eps), color="C1", linestyle=":", label="w_AT")
    panel.set(xlabel="w", ylabel="accuracy, %", title="Accuracy")


def draw_at(panel: Axes, m: Model) -> None:
    eps = np.linspace(0.02, 0.8, 40) * min(m.eta, 1)
    panel.plot(eps, [t.w_at(m, e) for e in eps], "C1", label="x_1 not attacked: exact")
    panel.plot(eps, [t.w_at_x1(m, e) for e in eps], "C2",
               label="x_1 attacked too: local optimum, while it exists")  # fmt: skip
    panel.axhline(t.w_st(m), color="C0", linestyle=":", label="w_ST")
    panel.set(xlabel="eps", ylabel="AT's optimum w", title="Theorem 4.2")


def draw_sam(panel: Axes, m: Model) -> None:
    above = [t.w_sam(m, r) / t.w_st(m) - 1 for r in radii(m)]
    panel.plot(radii(m), above, "o", markersize=3, label="w_SAM: exact")
    panel.plot(radii(m), radii(m) ** 2 / (3 * m.n), label="rho^2 / 3n")
    panel.set(xlabel="rho", ylabel="w_SAM / w_ST - 1", xscale="log", yscale="log",
              title="Theorems 4.3 and 4.4")  # fmt: skip


def draw_relation(panel: Axes, m: Model) -> None:
    panel.plot(radii(m), [t.eps_at(m, r) for r in radii(m)], "o", markersize=3, label="exact")
    panel.plot(radii(m), t.eps_at_series(m, radii(m)), label="eta rho^2 / (3n + rho^2)")
    panel.set(xlabel="rho (units of weights)", ylabel="eps of AT with the same w (units of inputs)",
              xscale="log", yscale="log", title="Theorem 4.5")  # fmt: skip


def draw_paths(panel: Axes, m: Model, rho: float) -> None:
    gap = t.w_sam(m, rho) - t.w_st(m)
    lrs = (0.1 * gap / rho, 0.01 * gap / rho)  # steps of about a tenth, a hundredth of the gap
    for run, label in ((t.one_step_sam, "SAM as it is run"),
                       (t.true_max_sam, "gradient at the true worst point")):  # fmt: skip
        path = run(m, rho, t.w_st(m) + 3 * gap, lrs, 60)
        panel.plot((path - t.w_st(m)) / gap, label=label)
    panel.axhline(0, color="black", linestyle=":", label="w_ST")
    panel.axhline(1, color="gray", linestyle="--", label="w_SAM")
    panel.set(xlabel="step; the learning rate falls tenfold at 60",
              ylabel="(w - w_ST) / (w_SAM - w_ST)", title=f"Paths, rho {rho:.3g}")  # fmt: skip


def draw_all_weights(panel: Axes, m: Model) -> None:
    rhos = np.linspace(0.02, 0.6, 16) * np.sqrt(m.n)
    panel.plot(rhos, [t.search_sam_all(m, r) for r in rhos], "o", markersize=3,
               label="ball over all weights: searched")  # fmt: skip
    panel.plot(rhos, [t.w_sam_all_series(m, r) for r in rhos],
               label="w_ST (1 - (2 - w_ST^2/n) rho^2/3n)")  # fmt: skip
    panel.plot(rhos, [t.w_sam(m, r) for r in rhos], label="ball in w alone: w_SAM")
    panel.axhline(t.w_st(m), color="black", linestyle=":", label="w_ST")
    panel.set(xlabel="rho", ylabel="SAM's optimum w", title="All weights perturbed")
