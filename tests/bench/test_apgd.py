"""Auto-PGD beside an image-by-image transcription, closed forms, and what every attack owes."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.attacks import apgd as subject
from bench.attacks.apgd import Course, apgd, apgd_targeted, checkpoints
from bench.attacks.objectives import log_odds, spread, targeted_dlr
from bench.attacks.pgd import Attack, pgd

from ..helpers.trained import held_out, model

NORMS = ("linf", "l2")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def size(delta, norm):
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


class Recorder:
    """A model that keeps what it was asked."""

    def __init__(self, forward):
        self.forward, self.seen = forward, []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return self.forward(x)


# ---- the schedule


def test_checkpoints_are_the_published_ones():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50, 77, 100, 1000])
def test_checkpoints_follow_the_recursion(steps):
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    assert checkpoints(steps) == sorted({math.ceil(q * steps) for q in p[1:-1]})


@pytest.mark.parametrize("length", [1, 4, 7, 16, 22, 100])
def test_a_checkpoint_halves_where_progress_ended(length):
    """Algorithm 1's conditions: fewer rises than 0.75 of the steps; or the same eta and the same
    best as at the checkpoint before."""
    rows = [(rises, before, improved) for rises in range(length + 1)
            for before in (False, True) for improved in (False, True)]  # fmt: skip
    n = len(rows)
    rises, before, improved = (torch.tensor(column) for column in zip(*rows, strict=True))
    x, zero, eta = torch.zeros(n, 1, 1, 1), torch.zeros(n), torch.full((n, 1, 1, 1), 0.5)
    checked = torch.where(improved, -1.0, 2.0)
    course = Course(
        index=rises, x=x, y=rises, t=rises, scale=x, now=x + 1, before=x, g=x + 1, f=zero + 1,
        best=x + 3, g_best=x + 3, f_best=zero + 2, eta=eta, rises=rises, f_checked=checked,
        halved=before,
    )  # fmt: skip
    course.check(length)
    halve = (4 * rises < 3 * length) | (~before & ~improved)
    assert torch.equal(course.halved, halve) and 0 < halve.sum() < n
    for found, kept, back in ((course.eta, 0.5, 0.25), (course.now, 1, 3), (course.g, 1, 3)):
        assert torch.equal(found.flatten(), torch.where(halve, float(back), float(kept)))
    assert torch.equal(course.f, torch.where(halve, 2.0, 1.0))
    assert not course.rises.any() and (course.f_checked == 2).all()


# ---- the algorithm


def transcription(f, x, x0, norm, eps, steps):
    """Algorithm 1 for one image, from the paper: all iterates and x_max. f: image -> float."""

    def grad(z):
        z = z.clone().requires_grad_(True)
        return torch.autograd.grad(f(z), z)[0]

    def p(z):
        if norm == "linf":
            return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)
        d = z - x
        return (x + (d * eps / d.norm() if d.norm() > eps else d)).clamp(0, 1)

    def ascent(z, eta):
        g = grad(z)
        return p(z + eta * (g.sign() if norm == "linf" else g / g.norm()))

    w = [0, *checkpoints(steps)]
    eta, eta_then = 2 * eps, None
    xs, fs = [x0], [f(x0).item()]
    x_max, f_max = x0, fs[0]
    f_max_then = f_max
    previous, rises, seen = x0, 0, [x0]
    for k in range(steps):
        z = ascent(xs[-1], eta)
        new = z if k == 0 else p(xs[-1] + 0.75 * (z - xs[-1]) + 0.25 * (xs[-1] - previous))
        previous = xs[-1]
        xs.append(new)
        fs.append(f(new).item())
        seen.append(new)
        rises += fs[-1] > fs[-2]
        if fs[-1] > f_max:
            x_max, f_max = new, fs[-1]
        if k + 1 in w:
            length = k + 1 - w[w.index(k + 1) - 1]
            condition_1 = rises < 0.75 * length
            condition_2 = eta == eta_then and f_max == f_max_then
            eta_then, f_max_then, rises = eta, f_max, 0
            if condition_1 or condition_2:
                eta /= 2
                xs[-1], fs[-1] = x_max, f_max
    return seen, x_max, eta


def bumpy(shape, classes=5, seed=3):
    """Logits with many local maxima in every ball; class 0 always wins."""
    g = rng(seed)
    n = math.prod(shape)
    a = torch.randn(n, 40, generator=g).double() * 6
    b = torch.randn(40, classes, generator=g).double() / 4
    bias = torch.tensor([12.0] + [0.0] * (classes - 1)).double()
    return lambda x: torch.sin(x.flatten(1) @ a) @ b + bias


@pytest.mark.parametrize("targeted", [False, True], ids=["ce", "dlr"])
@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.4)])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_every_image_goes_as_the_transcription(norm, eps, steps, targeted):
    n, shape = 8, (2, 3, 3)
    forward = bumpy(shape)
    x = torch.rand(n, *shape, generator=rng(1)).double()
    x[:2] = x[:2].round()  # on the faces of the box
    y, t = torch.zeros(n).long(), 1 + torch.arange(n) % 4
    record = Recorder(forward)
    found, fooled = apgd(record, x, y, norm, eps, steps, t if targeted else None, rng(2))
    assert not fooled.any() and len(record.seen) == steps + 1
    halved = 0
    for i in range(n):

        def f(z, i=i):
            logits = forward(z[None])
            own = t[i : i + 1]
            scale = spread(forward(record.seen[0][i : i + 1]))
            return (targeted_dlr(logits, y[:1], own) if targeted
                    else log_odds(logits, y[:1], scale))[0]  # fmt: skip

        seen, x_max, eta = transcription(f, x[i], record.seen[0][i], norm, eps, steps)
        halved += eta < 2 * eps
        torch.testing.assert_close(torch.stack([s[i] for s in record.seen]), torch.stack(seen))
        torch.testing.assert_close(found[i], x_max)
    if steps == 40:
        assert 0 < halved, "no step was ever halved: the test shows nothing of it"


def test_an_oscillation_halves_the_step_and_returns_to_the_best():
    """On a peak narrower than the step every second step falls, until it is halved often enough."""
    c, eps = 0.55, 0.2
    record = Recorder(lambda x: torch.cat([4 + (x.flatten(1) - c).abs(), 0 * x.flatten(1)], 1))
    x, y = torch.full((1, 1, 1, 1), 0.5).double(), torch.tensor([0])
    found, _ = apgd(record, x, y, "linf", eps, 100, generator=rng())
    at = torch.cat(record.seen).flatten()
    distance = (at - c).abs()
    best = at[: 22 + 1][distance[: 22 + 1].argmin()]
    plain = (best + eps * (c - best).sign()).clamp(0.5 - eps, 0.5 + eps)  # eta: 2 eps -> eps
    after = best + 0.75 * (plain - best) + 0.25 * (best - at[21])
    torch.testing.assert_close(at[23], after.clamp(0.5 - eps, 0.5 + eps))
    for w, later in zip([22, 41, 57, 70, 80, 87, 93], [41, 57, 70, 80, 87, 93, 99], strict=True):
        halvings = 1 + [22, 41, 57, 70, 80, 87, 93].index(w)
        steps = (at[w + 2 : later + 1] - at[w + 1 : later]).abs()
        assert steps.max() <= 2 * eps / 2**halvings * (1 + 1e-9)
    assert (found - c).abs().item() == distance.min() <= 2 * eps / 2**7


@pytest.mark.parametrize("norm", NORMS)
def test_it_returns_the_first_misclassified_iterate_or_the_best_one(norm):
    x, y = held_out(24)
    eps, kinds = {"linf": 0.06, "l2": 0.5}[norm], set()
    for i in range(len(x)):
        record = Recorder(model())
        found, fooled = apgd(record, x[i : i + 1], y[i : i + 1], norm, eps, 20, generator=rng(i))
        with torch.no_grad():
            seen = torch.cat(record.seen)
            logits = torch.cat([model()(s[None]) for s in seen])
        wrong = logits.argmax(1) != y[i]
        assert wrong.any() == fooled.item() and not wrong[:-1].any(), "it went on after that"
        f = log_odds(logits, y[i].expand(len(seen)), spread(logits[:1]))
        expected = -1 if fooled else int(f.argmax())
        assert torch.equal(found[0], seen[expected])
        assert fooled or f[expected] >= f[0]
        kinds.add(fooled.item())
    assert kinds == {True, False}


# ---- what every attack owes


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [apgd, apgd_targeted], ids=["ce", "dlr"])
def test_it_finds_what_pgd_finds_and_its_flags_are_true(norm, attack):
    x, y = held_out(100)
    eps = {"linf": 0.07, "l2": 0.4}[norm]
    found, fooled = attack(model(), x, y, norm, eps, 40, generator=rng())
    x_adv = pgd(model(), x, y, Attack(norm, eps, eps / 4, 40), rng())
    with torch.no_grad():
        assert torch.equal(model()(found).argmax(1) != y, fooled)
        by_pgd = (model()(x_adv).argmax(1) != y).sum().item()
    assert 10 < by_pgd < 90, "too easy or too hard to tell attacks apart"
    assert fooled.sum().item() >= by_pgd - 1
    assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
    assert size(found - x, norm).max() <= eps * (1 + 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_model_it_is_the_closed_form(norm):
    d = torch.randn(1, 3, 4, 4, generator=rng(4)).double()

    def forward(x):
        return torch.stack([x.new_full((len(x),), 9.0), (x * d).flatten(1).sum(1)], dim=1)

    x, y = torch.rand(6, 3, 4, 4, generator=rng(5)).double(), torch.zeros(6).long()
    if norm == "linf":
        eps, x[:2] = 0.3, x[:2].round()
        best = (x + eps * d.sign()).clamp(0, 1)
    else:
        eps, x = 0.15, 0.3 + 0.4 * x  # the ball lies within the box
        best = x + eps * d / d.norm()
    found, fooled = apgd(forward, x, y, norm, eps, 100, generator=rng(6))
    assert not fooled.any()
    torch.testing.assert_close(found, best, rtol=0, atol=1e-12 if norm == "linf" else 1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    norm=st.sampled_from(NORMS),
    eps=st.floats(1e-3, 3),
    steps=st.integers(1, 12),
    targeted=st.booleans(),
    slope=st.sampled_from([0.0, 1e-20, 1.0, 1e6]),
)
def test_it_stays_in_the_ball_and_the_box(seed, norm, eps, steps, targeted, slope):
    g = rng(seed)
    x = (1.5 * torch.rand(4, 1, 2, 3, generator=g) - 0.25).clamp(0, 1)
    a = slope * torch.randn(6, 5, generator=g)
    y = torch.randint(0, 5, (4,), generator=g)
    attack = apgd_targeted if targeted else apgd
    found, fooled = attack(lambda x: x.flatten(1) @ a, x, y, norm, eps, steps, generator=g)
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1
    assert (size(found - x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    assert torch.equal((found.flatten(1) @ a).argmax(1) != y, fooled)


def test_an_image_depends_on_no_other():
    """The batch shrinks as images fall; the rest goes on as if alone."""
    x, y = held_out(30)
    together, _ = apgd(model(), x, y, "linf", 0.06, 20, generator=rng(9))
    start = torch.empty_like(x).uniform_(-0.06, 0.06, generator=rng(9))
    for i in (0, 7, 29):
        start_of = subject.random_start
        try:
            subject.random_start = lambda *a, i=i: (x + start).clamp(0, 1)[i : i + 1]
            alone, _ = apgd(model(), x[i : i + 1], y[i : i + 1], "linf", 0.06, 20)
        finally:
            subject.random_start = start_of
        torch.testing.assert_close(alone[0], together[i])


@pytest.mark.parametrize("shape", [(64,), (8, 8), (2, 2, 2, 8), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("norm, eps", [("linf", 16 / 255), ("l2", 0.5)])
def test_images_have_any_shape(shape, norm, eps):
    """A row of numbers or a film was blown up to the batch's size, where PGD attacks it."""
    x, y = held_out(24)

    def attacked(shape):
        x_own, net = x.reshape(24, *shape), lambda x: model()(x.reshape(-1, 1, 8, 8))
        return [*apgd(net, x_own, y, norm, eps, 6, generator=rng()),
                *apgd_targeted(net, x_own, y, norm, eps, 3, generator=rng())]  # fmt: skip

    for own, usual in zip(attacked(shape), attacked((1, 8, 8)), strict=True):
        assert torch.equal(own.reshape(usual.shape), usual)


def test_it_touches_no_gradients():
    x, y = held_out(5)
    apgd(model(), x, y, "l2", 0.3, 3, generator=rng())
    assert all(p.grad is None for p in model().parameters()) and not x.requires_grad


def test_targets_are_the_likeliest_other_classes_and_fallen_images_rest(monkeypatch):
    asked = []

    def none_but_image_2(forward, x, y, norm, eps, steps, t, generator, judge):
        asked.append(t.tolist())
        return x, x.flatten(1)[:, 0] == 2

    monkeypatch.setattr(subject, "apgd", none_but_image_2)
    logits = torch.randn(3, 12, generator=rng())
    x, y = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1), torch.tensor([4, 5, 6])
    _, fooled = apgd_targeted(lambda x: logits, x, y, "linf", 0.1, 1)
    by_logit = [[c for c in z.argsort(descending=True).tolist() if c != own]
                for z, own in zip(logits, [4, 5, 6], strict=True)]  # fmt: skip
    assert asked[0] == [order[0] for order in by_logit]
    assert asked[1:] == [[by_logit[0][j], by_logit[2][j]] for j in range(1, 9)]
    assert fooled.tolist() == [False, True, False]
