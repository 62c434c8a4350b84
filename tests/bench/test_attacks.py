"""PGD: the ball, the box, the loss it raises, what it must not touch; the eps notation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bench.attacks.by_name import attempt
from bench.attacks.notation import eps_key, parse_eps
from bench.attacks.objectives import rising, spread
from bench.attacks.pgd import Attack, evaluation_attack, l2_norm, pgd
from bench.models import build_model

LINF = Attack("linf", 8 / 255, 2 / 255, 10)
L2 = Attack("l2", 128 / 255, 32 / 255, 10)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model("smallconv", 4, 3, 5, [0.5] * 3, [0.25] * 3)
    with torch.no_grad():  # running statistics that differ from a fresh layer's
        model(torch.rand(64, 3, 8, 8))
    return model.eval()


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    x = torch.rand(32, 3, 8, 8, generator=g)
    x[:4], x[4:8] = 0.0, 1.0  # at the box's faces half of every step is cut off
    return x, torch.randint(0, 5, (32,), generator=g)


def norm_of(delta, attack):
    flat = delta.flatten(1)
    return flat.abs().amax(1) if attack.norm == "linf" else flat.norm(dim=1)


@pytest.mark.parametrize("attack", [LINF, L2], ids=lambda a: a.norm)
def test_stays_in_the_ball_and_the_box_and_raises_the_loss(model, batch, attack):
    x, y = batch
    x_adv = pgd(model, x, y, attack, torch.Generator().manual_seed(2))
    radius = norm_of(x_adv - x, attack)
    assert (radius <= attack.eps * (1 + 1e-5)).all()
    assert radius[8:].max() > 0.99 * attack.eps, "an attack that does not use its ball"
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    with torch.no_grad():
        before, after = (F.cross_entropy(model(z), y, reduction="none") for z in (x, x_adv))
        start = pgd(model, x, y, Attack(attack.norm, attack.eps, 1e-12, 0))
        assert after.mean() > before.mean()
        assert after.mean() > F.cross_entropy(model(start), y), "no better than its random start"


def test_the_evaluations_steps_are_sam_ats():
    """eval.py's: a quarter of the l_inf radius, an eighth of the l2 one; in the text beside the
    number as they are."""
    assert evaluation_attack("linf", 8 / 255, 20) == Attack("linf", 8 / 255, 2 / 255, 20)
    assert evaluation_attack("l2", 128 / 255, 10) == Attack("l2", 128 / 255, 16 / 255, 10)
    text = attempt("pgd", "l2", 128 / 255, 10, classes=10).text
    assert text.startswith("PGD-10, l2, eps 128/255 = 0.502, alpha 16/255 = 0.06275, random start")


def test_the_logits_spread_grows_over_pgds_steps():
    """Low first, by which every wrong class counts; a single step has the high one."""
    spreads = [rising(i, 10) for i in range(10)]
    assert spreads[0] == pytest.approx(5) and spreads[-1] == pytest.approx(10)
    assert spreads == sorted(spreads) and rising(0, 1) == 10
    ratios = [b / a for a, b in zip(spreads, spreads[1:], strict=False)]
    assert ratios == pytest.approx([2 ** (1 / 9)] * 9)


@pytest.mark.parametrize("attack", [LINF, L2], ids=lambda a: a.norm)
def test_touches_neither_gradients_nor_batchnorm(model, batch, attack):
    x, y = batch
    kept = torch.rand_like(next(model.parameters()))
    next(model.parameters()).grad = kept.clone()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pgd(model, x.requires_grad_(False), y, attack)
    assert torch.equal(next(model.parameters()).grad, kept)
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert x.grad is None


@pytest.mark.parametrize("attack", [LINF, L2], ids=lambda a: a.norm)
def test_on_8_bit_images_the_course_of_x_adv_is_that_of_delta(model, batch, attack):
    """Madry et al. 2018 in the perturbation: the same bits, since x + (x_adv - x) gives x_adv."""

    def loss(logits, to):
        return F.cross_entropy((to * logits / spread(logits)).double(), y, reduction="sum")

    x, y = (batch[0] * 255).round() / 255, batch[1]
    start = pgd(model, x, y, replace(attack, steps=0), torch.Generator().manual_seed(5))
    delta, eps = start - x, attack.eps
    for i in range(attack.steps):
        delta.requires_grad_(True)
        (g,) = torch.autograd.grad(loss(model(x + delta), rising(i, attack.steps)), delta)
        delta = delta.detach()
        if attack.norm == "linf":
            delta = torch.clamp(delta + attack.alpha * torch.sign(g), -eps, eps)
        else:
            delta = delta + attack.alpha * g / l2_norm(g)
            delta = delta * torch.clamp(eps / l2_norm(delta), max=1)
        delta = torch.clamp(x + delta, 0, 1) - x
    x_adv = pgd(model, x, y, attack, torch.Generator().manual_seed(5))
    if attack.norm == "linf":
        assert torch.equal(x_adv, x + delta)
    torch.testing.assert_close(x_adv, x + delta, rtol=0, atol=1e-6)
    assert not torch.equal(x_adv, start)


def test_random_start_needs_its_generator_only(model, batch):
    x, y = batch
    first, again = (pgd(model, x, y, L2, torch.Generator().manual_seed(7)) for _ in range(2))
    other = pgd(model, x, y, L2, torch.Generator().manual_seed(8))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_zero_gradient_is_no_nan(batch):
    x, y = batch

    def flat(x):
        return (x * 0).sum((1, 2, 3)).unsqueeze(1).expand(-1, 5)

    for attack in (LINF, L2):
        assert pgd(flat, x, y, attack).isfinite().all()


@pytest.mark.parametrize(
    "text, norm, value",
    [
        ("8/255", "linf", 8 / 255),
        ("8", "linf", 8 / 255),
        ("8.0", "linf", 8 / 255),
        (" 8 / 255 ", "linf", 8 / 255),
        ("0.031", "linf", 0.031),
        ("1", "l2", 1 / 255),
        ("0.5", "l2", 0.5),
        ("128", "l2", 128 / 255),
        ("3/2", "l2", 1.5),
        ("63", "linf", 63 / 255),
    ],
)
def test_eps_notation(text, norm, value):
    assert parse_eps(text, norm) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["", "eight", "8/", "/255", "8/0", "8/255/2", "-8", "-8/255", "0", "nan", "inf", "64"]
)
def test_eps_nonsense_is_named(text):
    with pytest.raises(ValueError, match="8/255") as error:
        parse_eps(text, "linf")
    assert repr(text) in str(error.value)


def test_large_linf_needs_force():
    with pytest.raises(ValueError, match="--force"):
        parse_eps("0.5", "linf")
    assert parse_eps("0.5", "linf", force=True) == 0.5


@given(st.integers(1, 63))
def test_eps_key_is_the_notation_it_came_from(k):
    assert eps_key(parse_eps(str(k), "linf")) == f"{k}/255" == eps_key(parse_eps(f"{k}/255", "l2"))
