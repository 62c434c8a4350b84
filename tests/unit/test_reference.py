"""fastsam.reference in float64 against the independent oracle and against numbers by hand."""

import math

import pytest
import torch

import fastsam
from fastsam import SAM, FriendlySAM

from ..helpers.drawn import normals
from ..helpers.lockstep import Course, build
from ..helpers.oracle import Oracle, exact
from ..helpers.variants import ADAM_GROUPS, BASES, GROUPS, VARIANTS, deal

SHAPES = [(7,), (4, 3), (1,), (2, 3, 2, 2), (5, 5), (), (3,)]
F64 = torch.float64


def weights(seed: int = 0) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t) for t in normals(SHAPES, seed, F64)]


def assert_same(course, step: int) -> None:
    for what, actual, expected in course.compared():
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13,
                                   msg=lambda text, w=what: f"{w} after step {step}: {text}")
    assert course.opt.skipped_steps == course.oracle.skipped


class FreeCourse(Course):
    """Lockstep without ever correcting the oracle: the errors of all steps add up."""

    def follow(self) -> None:
        pass


@pytest.mark.parametrize("name", VARIANTS)
def test_course_of_25_steps_equals_the_oracle(name):
    """Weights, moved weights, m and v at every step; missing and bad gradients on the way."""
    course = FreeCourse(weights(), deal(len(SHAPES), GROUPS), name, "reference")
    for t in range(25):
        first, second = (normals(SHAPES, seed + t, F64) for seed in (1000, 2000))
        if t == 7:
            first[1] = second[2] = first[3] = second[3] = None
        if t == 11:
            first[4][0, 0] = math.inf
        course.first_step(first)
        assert course.opt.last_grad_norm == pytest.approx(course.oracle.norm, rel=1e-12,
                                                           nan_ok=True)
        for what, actual, expected in course.compared():
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13,
                                       msg=lambda text, w=what, t=t: f"{w} moved at {t}: {text}")
        course.second_step(second)
        assert_same(course, t)
    assert course.oracle.skipped == 1


@pytest.mark.parametrize("base", ["adam", "adamw"])
@pytest.mark.parametrize("name", ["sam", "fasam"])
def test_adam_over_25_steps_equals_the_oracle(name, base):
    course = FreeCourse(weights(), deal(len(SHAPES), ADAM_GROUPS), name, "reference", base)
    for t in range(25):
        first, second = (normals(SHAPES, seed + t, F64) for seed in (1000, 2000))
        if t % 5 == 2:
            second[1] = first[3] = second[3] = None
        if t == 11:
            first[4][0, 0] = math.nan
        course.first_step(first)
        course.second_step(second)
        assert_same(course, t)
    assert course.oracle.skipped == 1


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
def test_plain_steps_equal_torch_s_own_optimizer(base):
    """In float64, to a few roundings, and the state has torch's names and values."""
    ours, theirs = weights(), weights()
    groups = GROUPS if base == "sgd" else ADAM_GROUPS
    opt = build(ours, deal(len(SHAPES), groups), "sam", "reference", base)
    plain = BASES[base]([{k: x for k, x in g.items() if k != "params"}
                         | {"params": [theirs[i] for i in g["params"]]}
                         for g in deal(len(SHAPES), groups)], lr=0.1)
    for t in range(10):
        for params, o in ((ours, opt), (theirs, plain)):
            for p, g in zip(params, normals(SHAPES, 70 + t, F64), strict=True):
                p.grad = g
            o.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        for key, value in plain.state[q].items():
            if value is not None:
                torch.testing.assert_close(opt.state[p][key].to(value), value, rtol=1e-12,
                                           atol=1e-14)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_parameter_that_comes_late_starts_its_own_averages(name):
    """m and v count per parameter: the first gradient of one may come at step 3."""
    course = FreeCourse(weights(), deal(len(SHAPES), GROUPS), name, "reference")
    for t in range(6):
        first, second = (normals(SHAPES, seed + t, F64) for seed in (3000, 4000))
        if t < 3:
            first[0] = second[1] = None
        course.first_step(first)
        course.second_step(second)
        assert_same(course, t)


def test_the_oracle_can_tell_wrong_mathematics():
    """The comparison fails when the optimizer's sigma differs by one percent."""
    course = FreeCourse(weights(), deal(len(SHAPES), GROUPS), "fsam", "reference")
    course.opt.param_groups[0]["sigma"] *= 1.01
    course.first_step(normals(SHAPES, 1, F64))
    with pytest.raises(AssertionError):
        assert_same(course, 0)


def test_adaptive_sam_is_asam_over_everything():
    ours = weights()
    groups = deal(len(SHAPES), GROUPS)
    opt = SAM([{**g, "params": [ours[i] for i in g["params"]]} for g in groups], torch.optim.SGD,
              adaptive=True, lr=0.1, backend="reference")
    oracle = Oracle(ours, groups, method="asam")
    grads = normals(SHAPES, 5, F64)
    for p, g in zip(ours, grads, strict=True):
        p.grad = g
    opt.first_step()
    oracle.first_step(grads)
    for p, w in zip(ours, oracle.w, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-13, atol=1e-13)


# ---- numbers by hand


def two(w, *args, cls=SAM, **kwargs):
    """One parameter of two weights and its optimizer, lr 0.5."""
    p = torch.nn.Parameter(torch.tensor(w, dtype=torch.float64))
    return p, cls([p], torch.optim.SGD, *args, lr=0.5, backend="reference", **kwargs)


def climb(p, opt, g) -> list[float]:
    p.grad = torch.tensor(g, dtype=torch.float64)
    opt.first_step(zero_grad=True)
    return p.tolist()


def step(p, opt, g) -> list[float]:
    p.grad = torch.tensor(g, dtype=torch.float64)
    opt.second_step(zero_grad=True)
    return p.tolist()


def near(*values):
    return pytest.approx(list(values), abs=1e-9)


def test_sam_by_hand():
    p, opt = two([1.0, 2.0], 0.1)
    assert climb(p, opt, [3.0, 4.0]) == near(1.06, 2.08)  # ||g|| = 5, e = 0.1 (0.6, 0.8)
    assert opt.last_grad_norm == pytest.approx(5.0)
    assert opt.last_radius == pytest.approx(0.1)
    assert step(p, opt, [1.0, -2.0]) == near(0.5, 3.0)  # from (1, 2), not from the moved ones


def test_the_norm_is_global_over_groups_and_each_has_its_rho():
    p, q = (torch.nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (1.0, 2.0))
    opt = SAM([{"params": [p], "rho": 0.1}, {"params": [q], "rho": 1.0}], torch.optim.SGD,
              lr=0.5, backend="reference")
    p.grad, q.grad = torch.full_like(p, 3.0), torch.full_like(q, 4.0)
    opt.first_step()
    assert [p.item(), q.item()] == near(1 + 0.1 * 3 / 5, 2 + 1.0 * 4 / 5)


def test_asam_by_hand():
    # T g = (3 * 1, 1 * -4) = (3, -4), norm 5; T^2 g = (9, -4); e = 0.5 / 5 (9, -4)
    p, opt = two([3.0, -1.0], 0.5, cls=fastsam.ASAM)
    assert climb(p, opt, [1.0, -4.0]) == near(3.9, -1.4)


def test_asam_of_the_authors_by_hand():
    # a weight 2 with eta 1: T = 3; a bias 5: T = 1. T g = (3, 4), norm 5; T^2 g = (9, 4)
    w = torch.nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    b = torch.nn.Parameter(torch.tensor([5.0], dtype=torch.float64))
    opt = fastsam.ASAM([w, b], torch.optim.SGD, 0.5, scale="weights", eta=1.0, lr=0.5,
                       backend="reference")
    w.grad, b.grad = torch.full_like(w, 1.0), torch.full_like(b, 4.0)
    opt.first_step()
    assert [w.item(), b.item()] == near(2.9, 5.4)


def test_friendly_sam_by_hand():
    # lmbda 0.5, sigma 0.5. Step 1: m = 0.5 g = (2, 0), d = (4, 0) - (1, 0) = (3, 0).
    p, opt = two([1.0, 1.0], 0.1, 0.5, 0.5, cls=FriendlySAM)
    assert climb(p, opt, [4.0, 0.0]) == near(1.1, 1.0)
    assert opt.last_grad_norm == pytest.approx(3.0)
    assert step(p, opt, [2.0, 0.0]) == near(0.0, 1.0)
    # Step 2: m = 0.5 (2, 0) + 0.5 (4, 6) = (3, 3), d = (4, 6) - (1.5, 1.5) = (2.5, 4.5).
    r = math.hypot(2.5, 4.5)
    assert climb(p, opt, [4.0, 6.0]) == near(0.1 * 2.5 / r, 1 + 0.1 * 4.5 / r)
    assert opt.state[p]["ema"].tolist() == [3.0, 3.0]


def test_friendly_sam_of_the_official_code_by_hand():
    # Step 1: d = g = (4, 3), m = g. Step 2: d = (4, 6) - 0.5 (4, 3) = (2, 4.5), and only then
    # m = 0.5 (4, 3) + 0.5 (4, 6) = (4, 4.5).
    p, opt = two([1.0, 1.0], 0.1, 0.5, 0.5, cls=FriendlySAM, convention="official")
    assert climb(p, opt, [4.0, 3.0]) == near(1.08, 1.06)
    assert opt.state[p]["ema"].tolist() == [4.0, 3.0]
    assert step(p, opt, [2.0, 2.0]) == near(0.0, 0.0)
    r = math.hypot(2.0, 4.5)
    assert climb(p, opt, [4.0, 6.0]) == near(0.2 / r, 0.45 / r)
    assert opt.state[p]["ema"].tolist() == [4.0, 4.5]


def test_friendly_asam_by_hand():
    # lmbda 0.5, sigma 1: d = g - 0.5 g = (0.5, -2); T d = (3 * 0.5, 1 * -2) = (1.5, -2), norm 2.5;
    # T^2 d = (4.5, -2); e = 0.5 / 2.5 (4.5, -2) = (0.9, -0.4)
    p, opt = two([3.0, -1.0], 0.5, 1.0, 0.5, True, cls=FriendlySAM)
    assert climb(p, opt, [1.0, -4.0]) == near(3.9, -1.4)


@pytest.mark.parametrize("kwargs, w1, v1, w2, v2", [
    # g = 2 + 0.1 w: w1 = 1 - 0.5 * 2.1; then g = 4 + 0.1 w1 = 3.995
    (dict(momentum=0.0), -0.05, None, -2.0475, None),
    # v1 = 2.1 undamped; v2 = 0.9 * 2.1 + 0.8 * 3.995 = 5.086
    (dict(momentum=0.9, dampening=0.2), -0.05, 2.1, -0.05 - 0.5 * 5.086, 5.086),
    # ahead = 2.1 + 0.9 * 2.1 = 3.99: w1 = 1 - 1.995; g = 4 - 0.0995 = 3.9005, v2 = 1.89 + 3.9005
    (dict(momentum=0.9, nesterov=True), -0.995, 2.1,
     -0.995 - 0.5 * (3.9005 + 0.9 * 5.7905), 5.7905),
])
def test_sgd_by_hand(kwargs, w1, v1, w2, v2):
    p, opt = two([1.0], 0.3, weight_decay=0.1, **kwargs)
    climb(p, opt, [1.0])
    assert step(p, opt, [2.0]) == near(w1)
    if v1 is not None:
        assert opt.state[p]["momentum_buffer"].tolist() == near(v1)
    climb(p, opt, [1.0])
    assert step(p, opt, [4.0]) == near(w2)
    if v2 is not None:
        assert opt.state[p]["momentum_buffer"].tolist() == near(v2)


@pytest.mark.parametrize("lmbda", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.0])
def test_the_two_conventions_climb_alike_through_the_proved_mapping(sigma, lmbda):
    """For the same m, sigma of Algorithm 1 and sigma l / (1 - sigma (1 - l)) of the official
    code give one direction. Equal first gradients of zero give both the same m."""
    mapped = sigma * lmbda / (1 - sigma * (1 - lmbda))
    moved = []
    for convention, s in (("algorithm1", sigma), ("official", mapped)):
        group = [dict(params=list(range(len(SHAPES))), rho=0.4, sigma=s, lmbda=lmbda)]
        params = weights()
        opt = build(params, group, "fsam" if convention == "algorithm1" else "fsam-official",
                    "reference")
        for t in range(8):
            for p, g in zip(params, normals(SHAPES, 50 + t, F64), strict=True):
                p.grad = g * (t > 0)
            opt.first_step()
            moved.append([exact(p) for p in params])
            opt.restore()
    for algorithm1, official in zip(moved[:8], moved[8:], strict=True):
        for a, b in zip(algorithm1, official, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
