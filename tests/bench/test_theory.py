"""The SAM/AT paper's binary model, against sampled data, quadrature and ascent on all weights."""

import itertools
import math

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.theory import model as t
from bench.theory.model import Model
from bench.theory.report import SETTINGS, at_statements, rows_of, sam_statements
from bench.theory.report import training_statements as of_training

MODELS = [Model(0.95, 0.2, 100), Model(0.8, 0.5, 4), Model(0.7, 0.4, 3)]


def drawn_models(number):
    rng = np.random.default_rng(0)
    for _ in range(number):
        n = int(rng.integers(1, 60))
        # w_ST up to 2 sqrt(n): beyond, float64 sees a plateau
        eta = float(rng.uniform(0.1, 1))
        p = 1 / (1 + math.exp(-2 * eta * rng.uniform(0.05, 2) * math.sqrt(n)))
        yield Model(p, eta, n)


def sampled_accuracy(m, w, eps, attack_x1, samples=200_000):
    """Return accuracy, and its standard error, on drawn data with every corner of the attack's box
    tried."""
    rng = np.random.default_rng(1)
    y = rng.choice([-1, 1], samples)
    x1 = np.where(rng.random(samples) < m.p, y, -y)
    x = rng.normal(m.eta * y[:, None], 1, (samples, m.n))
    right = np.ones(samples, bool)
    for corner in itertools.product([-eps, eps], repeat=m.n + 1):
        moved = x1 + corner[0] * attack_x1
        right &= np.sign(w * moved + (x + np.array(corner[1:])).sum(1)) == y
    return right.mean(), right.std() / math.sqrt(samples)


@pytest.mark.parametrize("m", [Model(0.8, 0.5, 4), Model(0.7, 0.4, 3)], ids=str)
@pytest.mark.parametrize("w", [0.0, 0.7, 2.5])
@pytest.mark.parametrize("eps, attack_x1", [(0.0, False), (0.2, False), (0.2, True)])
def test_accuracy_is_that_of_drawn_data(m, w, eps, attack_x1):
    sampled, error = sampled_accuracy(m, w, eps, attack_x1)
    assert error < 1.2e-3
    assert abs(t.accuracy(m, w, eps, attack_x1) - sampled) < 4 * error


def integrated_accuracy(m, w, eps):
    """Return the accuracy by adding up the density of the weak features' sum."""
    s, step = np.linspace(-40, 40, 800_001, retstep=True)
    density = np.exp(-(s**2) / 2) / math.sqrt(2 * math.pi) * step
    total = m.n * (m.eta - eps) + math.sqrt(m.n) * s
    return m.p * density[total + w > 0].sum() + (1 - m.p) * density[total - w > 0].sum()


@pytest.mark.parametrize("m", MODELS, ids=str)
@pytest.mark.parametrize("w", [-3.0, 0.0, 1.3, 9.0])
def test_accuracy_is_the_integral(m, w):
    for eps in (0.0, m.eta / 2):
        expected = integrated_accuracy(m, w, eps)
        assert t.accuracy(m, w, eps) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_slope_is_the_derivative_of_the_error_up_to_its_constant(m):
    h, w_st = 1e-5, t.w_st(m)
    error = lambda w: -t.accuracy(m, w)  # noqa: E731
    first = lambda w: (error(w + h) - error(w - h)) / (2 * h)  # noqa: E731
    second = (first(w_st + 0.01) - first(w_st - 0.01)) / 0.02
    for w in (w_st - 1, w_st + 0.3, w_st + 2):
        assert t.slope(m, w) == pytest.approx(first(w) / second, rel=1e-3)
    assert t.slope(m, w_st) == 0


def test_closed_forms_are_optima():
    for m in drawn_models(40):
        step, eps, rho = 0.01 * t.w_st(m), 0.3 * min(m.eta, 1), 0.3
        at = t.w_at(m, eps)
        around = np.array([-1, 0, 1])
        for error in (
            t.log_error(m, t.w_st(m) + step * around),
            t.log_error(m, at + 0.01 * at * around, eps),
            [max(t.log_error(m, t.w_sam(m, rho) + step * i + d) for d in (-rho, rho))
             for i in around],
        ):  # fmt: skip
            assert error[1] < min(error[0], error[2]), m
        x1 = t.w_at_x1(m, eps)
        if x1 > 0:
            error = t.log_error(m, x1 + 1e-3 * x1 * around, eps, attack_x1=True)
            assert error[1] < min(error[0], error[2]), m
        elif x1 == 0:
            assert (np.diff(t.log_error(m, step * np.arange(3), eps, attack_x1=True)) > 0).all()


def test_attack_on_x1_raises_w_only_where_it_should():
    for m in drawn_models(40):
        condition = t.w_st(m) * (1 + t.w_st(m) / m.n)
        if abs(condition - 1) > 0.05:
            assert (t.w_at_x1(m, 1e-4 * min(m.eta, 1)) > t.w_st(m)) == (condition > 1), m


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_series_have_the_right_coefficients(m):
    rho, w_st = 0.02 * math.sqrt(m.n), t.w_st(m)
    for found, series in (
        (t.w_sam(m, rho) - w_st, t.w_sam_series(m, rho) - w_st),
        (t.eps_at(m, rho), t.eps_at_series(m, rho)),
        (t.search_sam_all(m, rho) - w_st, t.w_sam_all_series(m, rho) - w_st),
    ):
        assert found == pytest.approx(series, rel=1e-2)


def ascended(m, w, rho, start, steps=400):
    """Return the log error after projected gradient ascent on all n + 1 weights."""
    v = torch.tensor([w] + [1.0] * m.n, dtype=torch.float64)
    e = torch.tensor(start) / np.linalg.norm(start) * rho
    for i in range(steps):
        e.requires_grad_(True)
        a, b = (v + e)[0], (v + e)[1:]
        right, wrong = (-(m.eta * b.sum() + sign * a) / b.norm() for sign in (1, -1))
        right, wrong = torch.special.log_ndtr(right), torch.special.log_ndtr(wrong)
        error = torch.logaddexp(math.log(m.p) + right, math.log(1 - m.p) + wrong)
        (g,) = torch.autograd.grad(error, e)
        e = e.detach() + 0.1 * rho * (1 - i / steps) * g / g.norm()
        e *= min(1, rho / e.norm())
    return error.item()


@pytest.mark.parametrize("m", [Model(0.8, 0.5, 4), Model(0.7, 0.4, 3), Model(0.9, 0.5, 1)], ids=str)
@pytest.mark.parametrize("w, rho", [(1.0, 0.1), (2.2, 0.6)])
def test_worst_of_all_weights_is_what_ascent_finds(m, w, rho):
    rng = np.random.default_rng(2)
    found = max(ascended(m, w, rho, rng.normal(size=m.n + 1)) for _ in range(4))
    assert t.worst_of_all(m, w, rho) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("m", SETTINGS, ids=str)
def test_one_step_sam_goes_to_w_st_from_both_sides(m):
    rho, lr, w_st = 0.3, 3e-4, t.w_st(m)
    longest_step = lr * max(abs(t.slope(m, w_st + side * 1.01 * rho)) for side in (-1, 1))
    assert longest_step < 0.2 * (t.w_sam(m, rho) - w_st)
    for start in (w_st - rho, t.w_sam(m, rho)):
        path = t.one_step_sam(m, rho, start, (lr,), 5000) - w_st
        assert (np.diff(path) * path[:-1] <= 0).all(), "a step away from w_ST"
        assert abs(path[-1]) < longest_step


def test_the_models_shown_bear_every_statement_out():
    at, sam = rows_of(SETTINGS, None, None)
    statements = [*at_statements(at), *sam_statements(sam), *of_training(sam)]
    assert [s.says for s in statements if not s.holds] == []
    assert {s.status for s in statements} == {"exact", "approximation", "does not carry over"}


def test_command_writes_table_and_figure(tmp_path, capsys):
    command = ["theory", "--p", "0.8", "--eta", "0.5", "--n", "4", "--eps", "0.1", "--rho", "0.2",
               "--out", str(tmp_path)]  # fmt: skip
    assert main(command) == 0
    text = (tmp_path / "theory.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert f"| {math.log(4):.7g} " in text and "does not carry over" in text
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, said",
    [(["--p", "0.5"], "0.5"), (["--p", "nan"], "nan"), (["--eta", "-1"], "-1"), (["--n", "0"], "0"),
     (["--eps", "0.2"], "0.2"), (["--eta", "3", "--eps", "1.5"], "1.5"), (["--rho", "0"], "0"),
     (["--rho", "10"], "10"), (["--rho", "1e-6"], "1e-06"),
     (["--p", "0.99", "--eta", "0.01", "--n", "5"], "flat"),
     (["--p", "0.99", "--eta", "50", "--n", "5", "--rho", "2"], "overflow")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, said, tmp_path, capsys):
    assert main(["theory", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "out").exists()
