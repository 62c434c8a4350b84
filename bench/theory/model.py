"""The SAM/AT paper's binary model: the optima of standard training, AT and SAM, in closed form and
by search.

Wei, Zhu and Zhang, "Sharpness-aware minimization alone can improve adversarial robustness" (arXiv
2305.05392), section 4: a label y = +-1, a robust feature x_1 = y with probability p, else -y, and
n weak features x_i ~ N(eta y, 1); the classifier is sgn(w x_1 + x_2 + ... + x_{n+1}). Closed forms
and searches share `log_error` alone; no search uses a derivative.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr

Radii = TypeVar("Radii", float, np.ndarray)  # one, or several at once


@dataclass(frozen=True)
class Model:
    """p: how often x_1 is right. eta: the weak features' mean. n: their number.

    Raises ValueError unless 1/2 < p < 1, eta > 0 and finite, n a whole number of at least 1.
    """

    p: float
    eta: float
    n: int

    def __post_init__(self) -> None:
        if not 0.5 < self.p < 1:
            raise ValueError(f"p must be above 1/2 and below 1, got {self.p}")
        if not 0 < self.eta < math.inf:
            raise ValueError(f"eta must be positive and finite, got {self.eta}")
        if self.n != int(self.n) or self.n < 1:
            raise ValueError(f"n must be a whole number of at least 1, got {self.n}")

    def __str__(self) -> str:
        return f"p {self.p:g}, eta {self.eta:g}, n {self.n}"


def check_eps(m: Model, eps: float) -> None:
    """Raise ValueError for a radius of AT at which the weak features would point the wrong way, or
    x_1 could be set to 0."""
    if not 0 < eps < min(m.eta, 1):
        raise ValueError(f"eps must be above 0 and below eta and 1 ({m}), got {eps}")


def check_rho(m: Model, rho: float) -> None:
    """Raise ValueError for a radius of SAM that is not positive or reaches all weights at 0."""
    if not 0 < rho < math.sqrt(m.n):
        raise ValueError(f"rho must be above 0 and below sqrt(n) ({m}), got {rho}")


def log_error(m: Model, w: float | np.ndarray, eps: float = 0.0, attack_x1: bool = False):
    """Return log(1 - u(w)): the logarithm, because the error itself can underflow.

    eps: radius of an l_inf attack on the weak features, and on x_1 as well if `attack_x1`; the
    worst case shifts every attacked feature by eps against y.
    """
    weak, lost = m.n * (m.eta - eps), np.abs(w) * eps * attack_x1
    right = log_ndtr(-(weak + w - lost) / math.sqrt(m.n))  # x_1 = y
    wrong = log_ndtr(-(weak - w - lost) / math.sqrt(m.n))
    return np.logaddexp(math.log(m.p) + right, math.log1p(-m.p) + wrong)


def accuracy(m: Model, w: float | np.ndarray, eps: float = 0.0, attack_x1: bool = False):
    """Return u(w) = p Phi((n eta + w) / sqrt n) + (1 - p) Phi((n eta - w) / sqrt n), attacked as in
    `log_error`."""
    return -np.expm1(log_error(m, w, eps, attack_x1))


def slope(m: Model, w: float) -> float:
    """Return L'(w) / L''(w_ST) for L = 1 - u: exp((w_ST^2 - w^2) / 2n) sinh(eta (w - w_ST)) / eta.

    The constant that is divided away is sqrt(2 p (1-p) / pi n) exp(-n eta^2 / 2 - w_ST^2 / 2n) eta.
    """
    w0 = w_st(m)
    return math.exp((w0**2 - w**2) / (2 * m.n)) * math.sinh(m.eta * (w - w0)) / m.eta


# ---- closed forms


def w_st(m: Model) -> float:
    """Theorem 4.1: ln(p / (1-p)) / 2 eta."""
    return math.log(m.p / (1 - m.p)) / (2 * m.eta)


def w_at(m: Model, eps: float) -> float:
    """Theorem 4.2: w_ST eta / (eta - eps). x_1 is not attacked."""
    return w_st(m) * m.eta / (m.eta - eps)


def w_at_x1(m: Model, eps: float) -> float:
    """Where AT that attacks x_1 as well has its local optimum: the smaller root of
    2 w (eta - eps) - 2 w^2 eps / n = ln(p (1-eps) / ((1-p) (1+eps))); nan where there is none, and
    0 where the right side is negative, which leaves x_1 unused."""
    odds = math.log(m.p * (1 - eps) / ((1 - m.p) * (1 + eps)))
    root = (m.eta - eps) ** 2 - 2 * eps / m.n * odds
    if odds <= 0:
        return 0.0
    return odds / (m.eta - eps + math.sqrt(root)) if root >= 0 else math.nan


def w_sam_series(m: Model, rho: float) -> float:
    """Theorem 4.4 with the constant derived here: w_ST (1 + rho^2 / 3n)."""
    return w_st(m) * (1 + rho**2 / (3 * m.n))


def eps_at_series(m: Model, rho: Radii) -> Radii:
    """Theorem 4.5 from that series: the eps at which AT has SAM's w, eta rho^2 / (3n + rho^2)."""
    return m.eta * rho**2 / (3 * m.n + rho**2)


# ---- by equation or search


def w_sam(m: Model, rho: float) -> float:
    """Theorem 4.3: the root of u(w - rho) = u(w + rho). u rises up to w_ST and falls after it, so
    the worst perturbation is an end of the interval, and the best w makes both ends equal."""
    low = w_st(m)
    return brentq(lambda w: log_error(m, w - rho) - log_error(m, w + rho), low, low + rho,
                  xtol=1e-14)  # fmt: skip


def eps_at(m: Model, rho: float) -> float:
    """Return the eps at which AT has SAM's w: eta (1 - w_ST / w_SAM)."""
    return m.eta * (1 - w_st(m) / w_sam(m, rho))


def search(f: Callable[[float], float], low: float, high: float, points: int = 400) -> float:
    """Return the best local minimum of f inside (low, high), nan if there is none, or none that
    float64 can tell from its surroundings: a grid, then Brent's search, good to about 1e-7."""
    grid = np.linspace(low, high, points)
    values = np.array([f(w) for w in grid])
    inside = np.flatnonzero((values[1:-1] <= values[:-2]) & (values[1:-1] < values[2:])) + 1
    if not len(inside):
        return math.nan
    i = min(inside, key=values.__getitem__)
    return minimize_scalar(f, bounds=(grid[i - 1], grid[i + 1]), method="bounded",
                           options={"xatol": 1e-12}).x  # fmt: skip


def search_st(m: Model) -> float:
    return search(lambda w: log_error(m, w), 0, 5 * w_st(m))


def search_at(m: Model, eps: float, attack_x1: bool = False) -> float:
    """Return the best w under attack. With `attack_x1` it is a local optimum, nan if there is none;
    see `x1_alone`."""
    return search(lambda w: log_error(m, w, eps, attack_x1), -1, 5 * w_at(m, eps))


def x1_alone(m: Model, eps: float) -> bool:
    """Return whether w -> infinity, x_1 alone with its accuracy p, beats AT's local optimum."""
    w = search_at(m, eps, attack_x1=True)
    return math.isnan(w) or accuracy(m, w, eps, attack_x1=True) < m.p


def search_sam(m: Model, rho: float) -> float:
    """Return the w with the lowest largest error within rho, the largest over a grid."""
    steps = np.linspace(-rho, rho, 41)
    low, high = w_st(m) - 2 * rho, w_st(m) + 2 * rho
    return search(lambda w: log_error(m, w + steps).max(), low, high)


# ---- SAM as it is run


def one_step_sam(m: Model, rho: float, w: float, lrs: tuple[float, ...], steps: int) -> np.ndarray:
    """Return w after every step of SAM on L = 1 - u: the gradient at w + rho sgn L'(w).

    lrs: in units of 1 / L''(w_ST), each for `steps` steps.
    """
    path = [w]
    for lr in np.repeat(lrs, steps):
        w -= lr * slope(m, w + rho * np.sign(slope(m, w)))
        path.append(w)
    return np.array(path)


def true_max_sam(m: Model, rho: float, w: float, lrs: tuple[float, ...], steps: int) -> np.ndarray:
    """Return the same path with the gradient at the worst point within rho in place of SAM's."""
    path = [w]
    for lr in np.repeat(lrs, steps):
        ends = (w - rho, w + rho)
        w -= lr * slope(m, max(ends, key=lambda end: log_error(m, end)))
        path.append(w)
    return np.array(path)


def worst_of_all(m: Model, w: float, rho: float) -> float:
    """Return the largest log error when an l2 ball of radius rho perturbs all n + 1 weights of
    (w, 1, ..., 1).

    The error depends on three numbers: a, the weight of x_1; s, the others' component along
    (1, ..., 1) / sqrt n; c, the length of the rest of them (n > 1). It does not change with the
    weights' scale, so the ball is the cone of angle arcsin(rho / |weights|).
    """
    start = np.array([w, math.sqrt(m.n), 0.0]) / math.hypot(w, math.sqrt(m.n))
    in_plane, apart = np.array([start[1], -start[0], 0.0]), np.array([0.0, 0.0, 1.0])
    widest = math.asin(rho / math.hypot(w, math.sqrt(m.n)))

    def log_error_at(angle, turn):
        a, s, c = (np.cos(angle) * start[i] + np.sin(angle)
                   * (np.cos(turn) * in_plane[i] + np.sin(turn) * apart[i])
                   for i in range(3))  # fmt: skip
        length, weak = np.hypot(s, c), m.eta * math.sqrt(m.n) * s
        right, wrong = log_ndtr(-(weak + a) / length), log_ndtr(-(weak - a) / length)
        return np.logaddexp(math.log(m.p) + right, math.log1p(-m.p) + wrong)

    if m.n == 1:
        return max(log_error_at(widest, 0.0), log_error_at(widest, math.pi))
    turns = np.linspace(0, math.pi, 61)
    angles = widest * np.linspace(0.05, 1, 20)[:, None]
    values = log_error_at(angles, turns)
    i, j = np.unravel_index(values.argmax(), values.shape)
    near = turns[max(j - 1, 0)], turns[min(j + 1, len(turns) - 1)]
    found = minimize_scalar(lambda t: -log_error_at(angles[i, 0], t), bounds=near,
                            method="bounded", options={"xatol": 1e-9})  # fmt: skip
    return max(values.max(), -found.fun)


def w_sam_all_series(m: Model, rho: float) -> float:
    """Return SAM's best w for that ball, derived here: w_ST (1 - (2 - w_ST^2 / n) rho^2 / 3n).

    For small rho the worst perturbation turns (w, 1, ..., 1) in its plane, by rho / |weights|;
    theorem 4.4's expansion in that angle gives the coefficient.
    """
    w = w_st(m)
    return w * (1 - (2 - w**2 / m.n) * rho**2 / (3 * m.n))


def search_sam_all(m: Model, rho: float) -> float:
    """Return the best w when SAM's ball is over all weights; w_2 = ... = 1 stay the scale."""
    return search(lambda w: worst_of_all(m, w, rho), 0, 3 * w_st(m), points=60)
