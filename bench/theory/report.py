"""`python -m bench theory`: what of the SAM/AT paper's theory is exact, what is not, and what does
not carry over to training; two tables of numbers and a figure."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.files import write_text
from bench.reports.tables import markdown
from bench.theory import model as t
from bench.theory.model import Model

# w_ST above and below 1, w_ST^2 above and below 2n, from one weak feature to a hundred
SETTINGS = (
    Model(0.95, 0.2, 100), Model(0.9, 0.3, 30), Model(0.8, 0.5, 4), Model(0.7, 0.1, 10),
    Model(0.6, 0.5, 10), Model(0.9, 0.5, 1),
)  # fmt: skip
OF_ETA, RHOS = (0.1, 0.25, 0.5), (0.1, 0.25, 0.5)
EXACT = 1e-5  # the searches are good to about 1e-7; the series are worse than this
LRS, STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), 200


class Statement(NamedTuple):
    """A row of the table of statements. holds: whether these numbers bear the status out."""

    where: str
    says: str
    status: str
    measured: str
    holds: bool

    def cells(self) -> list[str]:
        return [self.where, self.says, self.status if self.holds else "not seen here",
                self.measured]  # fmt: skip


def at_row(m: Model, eps: float) -> dict[str, Any]:
    """Return AT's optima at radius eps, closed form beside search."""
    return {
        "model": m, "eps": eps, "w_ST": t.w_st(m), "w_ST searched": t.search_st(m),
        "w_AT": t.w_at(m, eps), "w_AT searched": t.search_at(m, eps),
        "x_1 too": t.w_at_x1(m, eps), "x_1 too, searched": t.search_at(m, eps, attack_x1=True),
        "x_1 alone is better": t.x1_alone(m, eps),
    }  # fmt: skip


def sam_row(m: Model, rho: float) -> dict[str, Any]:
    """Return SAM's optima at radius rho, closed form beside search, and where SAM itself ends.

    Raises ValueError for a rho at which w_SAM and w_ST are one number, and where the steps of SAM
    leave what float64 can hold.
    """
    low, high = t.w_st(m), t.w_sam(m, rho)
    if high - low < 1e-9 * low:
        raise ValueError(f"rho {rho} is too small for w_SAM to differ from w_ST ({m})")
    try:
        ends = {
            "SAM ends": t.one_step_sam(m, rho, high, LRS, STEPS)[-1],
            "true max ends": t.true_max_sam(m, rho, low, LRS, STEPS)[-1],
        }
    except OverflowError as e:
        raise ValueError(
            f"at rho {rho} the accuracy is so steep that SAM's steps overflow ({m}); choose a "
            "smaller eta, p or rho"
        ) from e
    return ends | {
        "model": m, "rho": rho, "w_ST": low, "w_SAM": high, "w_SAM searched": t.search_sam(m, rho),
        "w_SAM series": t.w_sam_series(m, rho),
        "eps_AT": t.eps_at(m, rho), "eps_AT series": t.eps_at_series(m, rho),
        "w_AT searched": t.search_at(m, t.eps_at(m, rho)),
        "all weights": t.search_sam_all(m, rho), "all weights series": t.w_sam_all_series(m, rho),
    }  # fmt: skip


def rows_of(
    models: Iterable[Model], eps: list[float] | None, rho: list[float] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return AT's rows and SAM's. eps, rho: radii; None: OF_ETA of eta, and RHOS.

    Raises ValueError for radii out of range, and where the accuracy is too flat to be searched.
    """
    cases = [(m, eps or [f * min(m.eta, 1) for f in OF_ETA], rho or RHOS) for m in models]
    for m, radii, rhos in cases:
        for e in radii:
            t.check_eps(m, e)
        for r in rhos:
            t.check_rho(m, r)
    at = [at_row(m, e) for m, radii, _ in cases for e in radii]
    for row in at:
        if math.isnan(row["w_ST searched"] + row["w_AT searched"]):
            raise ValueError(
                f"at {row['model']}, eps {row['eps']:g} the accuracy around w_ST "
                f"{row['w_ST']:.4g} and w_AT {row['w_AT']:.4g} is flat to float64's precision; "
                "choose a larger eta or n, or a smaller p or eps"
            )
    return at, [sam_row(m, r) for m, _, rhos in cases for r in rhos]


def largest(rows: list[dict[str, Any]], name: str, other: str) -> float:
    """Return the largest |name / other - 1| over the rows that have both."""
    errors = [abs(row[name] / row[other] - 1) for row in rows
              if row[other] != 0 and not math.isnan(row[name] + row[other])]  # fmt: skip
    return max(errors, default=math.nan)


def of(part: list, whole: list) -> str:
    return f"{len(part)} of {len(whole)}"


def percent(error: float) -> str:
    return "no case" if math.isnan(error) else f"{error:.1%}"


def searched(where: str, says: str, error: float) -> Statement:
    """Return an exact statement that a search checked to the relative error."""
    found = "no case" if math.isnan(error) else f"largest error {error:.0e} relative"
    return Statement(where, says, "exact", found, error < EXACT)


def monotone(f: Callable[[np.ndarray], np.ndarray], low: float, high: float, sign: int) -> bool:
    """Return whether f moves in the direction `sign` at each of 200 steps from low to high."""
    return all(sign * (b - a) > 0 for a, b in pairwise(f(np.linspace(low, high, 200))))


def trade_off(row: dict[str, Any]) -> bool:
    """Return whether clean accuracy falls, and accuracy at eps rises, all the way from w_ST to
    w_AT; log errors, so that no difference is lost."""
    m, ends = row["model"], (row["w_ST"], row["w_AT"])
    return monotone(lambda w: t.log_error(m, w), *ends, +1) and monotone(
        lambda w: t.log_error(m, w, row["eps"]), *ends, -1
    )


def off_target(rows: list[dict[str, Any]], end: str, target: str) -> float:
    """Return the largest |end - target|, as a share of w_SAM - w_ST."""
    return max(abs(row[end] - row[target]) / (row["w_SAM"] - row["w_ST"]) for row in rows)


def order(m: Model, rho: float) -> float:
    """Return the power of rho with which the error of w_SAM's series grows, from rho/2 to rho."""
    half, full = (abs(t.w_sam_series(m, r) - t.w_sam(m, r)) for r in (rho / 2, rho))
    return math.log2(full / half) if full and half else math.nan


def at_statements(at: list[dict[str, Any]]) -> list[Statement]:
    finite = [row for row in at if not math.isnan(row["x_1 too, searched"])]
    lowered = [row for row in finite if row["x_1 too, searched"] < row["w_ST"]]
    alone = [row for row in at if row["x_1 alone is better"]]
    falls = [row for row in at if trade_off(row)]
    off = largest(finite, "w_AT", "x_1 too")
    corrected = max((abs(row["x_1 too"] - row["x_1 too, searched"]) / row["w_ST"]
                     for row in finite), default=math.nan)  # fmt: skip
    return [
        searched("4.1", "w_ST = ln(p/(1-p)) / (2 eta) is the one optimum of clean accuracy",
                 largest(at, "w_ST", "w_ST searched")),
        searched("4.2", "w_AT = w_ST eta/(eta-eps), x_1 not attacked",
                 largest(at, "w_AT", "w_AT searched")),
        Statement("4.2", "the same, x_1 attacked as well", "approximation",
                  f"largest error {percent(off)}, where an optimum above 0 is left; x_1 alone is "
                  f"better in {of(alone, at)} cases", off > EXACT),
        searched("ours", "x_1 attacked as well: 2w(eta-eps) - 2w^2 eps/n = "
                 "ln(p(1-eps) / ((1-p)(1+eps)))", corrected),
        Statement("4.2", "AT raises w, x_1 attacked as well", "does not carry over",
                  f"w falls below w_ST in {of(lowered, finite)} cases; for small eps it does where "
                  "w_ST (1 + w_ST/n) < 1", bool(lowered)),
        Statement("4.2", "from w_ST to w_AT(eps) clean accuracy falls and accuracy at eps rises",
                  "exact", f"at each of 200 steps in {of(falls, at)} cases", falls == at),
    ]  # fmt: skip


def sam_statements(sam: list[dict[str, Any]]) -> list[Statement]:
    above = [row for row in sam if row["w_SAM searched"] > row["w_ST"]]
    constants = [(row["w_SAM"] / row["w_ST"] - 1) / row["rho"] ** 2 for row in sam]
    largest_rho = {row["model"]: row["rho"] for row in sorted(sam, key=lambda row: row["rho"])}
    orders = [order(m, rho) for m, rho in largest_rho.items()]
    series = largest(sam, "w_SAM series", "w_SAM")
    relation = largest(sam, "eps_AT series", "eps_AT")
    return [
        searched("4.3", "w_SAM solves u(w-rho) = u(w+rho), the ball being in w alone",
                 largest(sam, "w_SAM", "w_SAM searched")),
        Statement("4.3", "w_SAM > w_ST", "exact", f"in {of(above, sam)} cases", above == sam),
        Statement("4.4", "w_SAM = w_ST (1 + rho^2/3n), the constant derived here", "approximation",
                  f"largest error {percent(series)}, of order rho^{min(orders):.2f} to "
                  f"rho^{max(orders):.2f}", min(orders) > 3.5),
        Statement("4.4", "the same with a constant that does not know n", "does not carry over",
                  f"(w_SAM/w_ST - 1)/rho^2 runs from {min(constants):.2g} to {max(constants):.2g}",
                  max(constants) > 1.1 * min(constants)),
        searched("4.5", "AT has SAM's w at eps_AT = eta (1 - w_ST/w_SAM), x_1 not attacked",
                 largest(sam, "w_AT searched", "w_SAM searched")),
        Statement("4.5", "eps_AT = eta rho^2 / (3n + rho^2)", "approximation",
                  f"largest error {percent(relation)}", relation < 1),
    ]  # fmt: skip


def training_statements(sam: list[dict[str, Any]]) -> list[Statement]:
    """Return what SAM as it is run has of the theory: little."""
    larger = [row for row in sam if row["rho"] > row["eps_AT"]]
    worse = [row for row in sam if t.log_error(row["model"], row["w_SAM"])
             > t.log_error(row["model"], row["w_ST"])]  # fmt: skip
    below = [row for row in sam if row["all weights"] < row["w_ST"]]
    light = [row for row in sam if row["w_ST"] ** 2 < 2 * row["model"].n]
    at_max, at_st = off_target(sam, "true max ends", "w_SAM"), off_target(sam, "SAM ends", "w_ST")
    over_all = largest(sam, "all weights series", "all weights")
    return [
        Statement("4.3", "gradient steps on the true largest error within rho end at w_SAM",
                  "exact", f"in the limit of small steps; off by up to {percent(at_max)} of "
                  "w_SAM - w_ST", at_max < 0.05),
        Statement("4.3", "SAM as it is run, one step uphill of length rho, ends at w_SAM",
                  "does not carry over", f"it ends at w_ST, off by up to {percent(at_st)} of "
                  "w_SAM - w_ST", at_st < 0.05),
        Statement("4.3", "SAM raises w when its ball is over all weights, as it is in training",
                  "does not carry over",
                  f"the optimum is below w_ST in {of(below, sam)} cases; for small rho it is where "
                  f"w_ST^2 < 2n, as in {of(light, sam)} cases", bool(below)),
        Statement("ours", "over all weights: w_ST (1 - (2 - w_ST^2/n) rho^2/3n)", "approximation",
                  f"largest error {percent(over_all)}", over_all < 1),
        Statement("4.5", "SAM needs the larger radius: rho > eps_AT", "does not carry over",
                  f"true as numbers in {of(larger, sam)} cases, but rho is in units of weights and "
                  "eps of inputs: the weights (kw, k, ..., k) classify alike and need k rho", True),
        Statement("sec. 5", "clean accuracy above standard training's, as SAM's networks have",
                  "does not carry over", f"at the model's w_SAM it is below, in {of(worse, sam)} "
                  "cases: u falls above w_ST", worse == sam),
    ]  # fmt: skip


def cell(value: Any) -> str:
    if isinstance(value, float):
        return "none" if math.isnan(value) else f"{value:.7g}"
    return {True: "yes", False: "no"}.get(value, str(value))


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(list(rows[0]), [[cell(x) for x in row.values()] for row in rows], left=1)


def report(at: list[dict[str, Any]], sam: list[dict[str, Any]]) -> str:
    """Return the table of statements and the two of numbers, as Markdown."""
    statements = [*at_statements(at), *sam_statements(sam), *training_statements(sam)]
    head = ["theorem", "says", "status", "measured"]
    return (
        f"{markdown(head, [s.cells() for s in statements], left=4)}\n\n"
        "eps: AT's radius, in units of inputs. rho: SAM's, in units of weights; the paper writes "
        "eps for both. Not seen here: other models or radii show it.\n\n"
        f"### Adversarial training\n\n{table(at)}\n\n"
        "x_1 too: the attack may move x_1 as well.\n\n"
        f"### SAM\n\n{table(sam)}\n\n"
        "SAM ends: after SAM's own steps on the expected error, started at w_SAM, the learning "
        "rate falling tenfold four times; true max ends: the same with the gradient at the worst "
        "point, started at w_ST. All weights: SAM's optimum when its ball is over all n + 1 "
        "weights."
    )


def theory(
    models: Iterable[Model], eps: list[float] | None, rho: list[float] | None, out: Path
) -> list[Path]:
    """Write theory.md and theory.png to `out`, print the tables, return the files' paths.

    eps, rho: AT's and SAM's radii, None for several of each. Raises ValueError as `rows_of`.
    """
    from bench.theory.figure import plot_theory

    models = list(models)
    at, sam = rows_of(models, eps, rho)
    text = report(at, sam)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "theory.md", out / "theory.png"]
    write_text(written[0], text + "\n")
    shown = models[0]
    own = [[row for row in rows if row["model"] == shown] for rows in (at, sam)]
    plot_theory(shown, own[0][-1]["eps"], own[1][-1]["rho"], written[1])
    print(text + "\n")
    print("\n".join(f"wrote {path}" for path in written))
    return written
