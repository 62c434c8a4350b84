"""No factor on the logits, no size of the batch and no precision of the gradients changes what an
attack finds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.attacks.apgd import apgd, apgd_targeted
from bench.attacks.by_name import attempt
from bench.attacks.objectives import SPREAD, answers, departure, log_odds, spread, targeted_dlr
from bench.attacks.pgd import Attack, drawn, fgsm, n_fgsm, pgd, random_start, trades, uniform_within
from bench.data.datasets import Split
from bench.evaluation.evaluate import evaluate, generator_of, report, withstand
from bench.settings.evaluation import resolve_evaluation
from bench.training.adversarial import divergence

from ..helpers.trained import digits, held_out, model

FACTORS = [1e-6, 0.3, 6.0, 1e6]
LINF, L2 = Attack("linf", 16 / 255, 4 / 255, 8), Attack("l2", 0.4, 0.05, 20)
ATTACKS = {
    "pgd-linf": lambda f, x, y: pgd(f, x, y, LINF, rng()),
    "pgd-l2": lambda f, x, y: pgd(f, x, y, L2, rng()),
    "fgsm-linf": lambda f, x, y: fgsm(f, x, y, Attack("linf", 0.1, 0.1, 1)),
    "fgsm-l2": lambda f, x, y: fgsm(f, x, y, Attack("l2", 0.7, 0.7, 1)),
    "fgsm-rs": lambda f, x, y: pgd(f, x, y, Attack("linf", 0.1, 0.125, 1), rng()),
    "n-fgsm": lambda f, x, y: n_fgsm(f, x, y, Attack("linf", 0.06, 0.06, 1), rng()),
    "trades": lambda f, x, y: trades(f, x, Attack("linf", 16 / 255, 4 / 255, 8), rng()),
    "apgd-ce-linf": lambda f, x, y: apgd(f, x, y, "linf", 16 / 255, 15, generator=rng())[0],
    "apgd-ce-l2": lambda f, x, y: apgd(f, x, y, "l2", 0.4, 15, generator=rng())[0],
    "apgd-t-linf": lambda f, x, y: apgd_targeted(f, x, y, "linf", 16 / 255, 8, rng())[0],
    "apgd-t-l2": lambda f, x, y: apgd_targeted(f, x, y, "l2", 0.4, 8, rng())[0],
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def scaled(factor, shift=0.0):
    return lambda x: factor * model()(x) + shift


def left(x, y):
    with torch.no_grad():
        return (model()(x).argmax(1) == y).sum().item()


# ---- the scale of the logits


@pytest.mark.parametrize("name", ATTACKS)
def test_a_power_of_two_on_the_logits_changes_no_bit(name):
    x, y = held_out(30)
    alone = ATTACKS[name](model(), x, y)
    assert not torch.equal(alone, x)
    for power in (-60, 3, 60):
        assert torch.equal(ATTACKS[name](scaled(2.0**power), x, y), alone), power


@pytest.mark.parametrize("name", ATTACKS)
def test_no_factor_changes_what_is_found(name):
    """Rounding sends an image elsewhere now and then."""
    x, y = held_out(100)
    alone = ATTACKS[name](model(), x, y)
    assert left(alone, y) < 97, "an attack that finds nothing shows nothing"
    for factor in FACTORS:
        found = ATTACKS[name](scaled(factor), x, y)
        assert abs(left(found, y) - left(alone, y)) <= 2, factor
        close = ((found - alone).abs().flatten(1).amax(1) < 1e-4).double().mean()
        assert close > 0.9, factor


def test_l2_pgd_on_a_network_that_is_sure():
    """PGD-20 at l2 0.5 on logits times 6, at batch 300: of cross-entropy's gradients as they come
    half are lost."""
    x, y = digits()
    split = Split((x[1500:] * 16).to(torch.uint8), y[1500:], 16)
    options = {"linf": (), "l2": (0.5,), "attacks": ("pgd-20",)}

    def accuracy(net, batch_size):
        found = evaluate(net, split, resolve_evaluation("digits", options | {
            "batch_size": batch_size}))  # fmt: skip
        return found["robust"]["l2"]["127.5/255"]

    plain = accuracy(model(), 300)
    assert 0.2 < plain < 0.5
    for factor in (6, 1e4):
        for batch_size in (300, 64):
            assert abs(accuracy(Scaled(factor), batch_size) - plain) <= 1.01 / 297


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.net, self.factor = model(), factor

    def forward(self, x):
        return self.factor * self.net(x)


def test_small_logits_hide_nothing_from_cross_entropy():
    """An under-trained network's: cross-entropy as it stands climbs by the mean of all classes."""
    x, y = held_out(200)
    alpha, small = LINF.alpha, scaled(0.02)
    x_adv = random_start(x, LINF, rng())
    for _ in range(LINF.steps):
        x_adv.requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(small(x_adv), y, reduction="sum"), x_adv)
        delta = x_adv.detach() + alpha * g.sign() - x
        x_adv = (x + delta.clamp(-LINF.eps, LINF.eps)).clamp(0, 1)
    assert left(pgd(small, x, y, LINF, rng()), y) <= left(x_adv, y) - 5


def test_the_constant_that_logits_share_is_of_no_effect():
    x, y = held_out(100)
    for name in ("pgd-linf", "apgd-ce-l2"):
        alone = left(ATTACKS[name](model(), x, y), y)
        for shift in (-50.0, 1000.0):
            assert abs(left(ATTACKS[name](scaled(1.0, shift), x, y), y) - alone) <= 2


def test_classes_that_are_switched_off_do_not_weaken_an_attack():
    off = torch.zeros(13)
    off[10:] = -1e9

    def padded(x):
        return F.pad(model()(x), (0, 3)) + off

    x, y = held_out(200)
    for name in ("pgd-linf", "pgd-l2", "apgd-ce-linf"):
        assert left(ATTACKS[name](padded, x, y), y) <= left(ATTACKS[name](model(), x, y), y) + 2


# ---- the objectives


def test_log_odds_are_cross_entropys_own_at_the_spread():
    z, y = torch.randn(30, 7, generator=rng()).double() * 5, torch.arange(30) % 7
    expected = F.cross_entropy(SPREAD * z / spread(z), y, reduction="none")
    torch.testing.assert_close(F.softplus(log_odds(z, y)), expected)
    scale = torch.rand(30, 1).double() + 0.5
    expected = F.cross_entropy(SPREAD * z / scale, y, reduction="none")
    torch.testing.assert_close(F.softplus(log_odds(z, y, scale)), expected)


def test_spread_is_from_the_first_to_the_third():
    z = torch.tensor([[5.0, 3, 2, -9], [1, 1, 1, 0], [4, 4, 4, 4], [2, 2, 1, 1]])
    assert spread(z).flatten().tolist() == [3, 1, 1, 1]
    assert spread(torch.tensor([[1.0, 4.0]])).item() == 3


@pytest.mark.parametrize("factor", [1e-36, 1e-6, 1e6, 1e36])
def test_no_objective_over_or_underflows(factor):
    z, y = torch.randn(50, 7, generator=rng()) * 9, torch.arange(50) % 7
    t, near = (y + 1) % 7, z + 0.1 * torch.randn(50, 7, generator=rng(1))

    def gradient(objective, c):
        own = z.clone().requires_grad_(True)
        return torch.autograd.grad(objective(c, own).sum(), own)[0]

    for objective in (lambda c, z: log_odds(c * z, y), lambda c, z: targeted_dlr(c * z, y, t),
                      lambda c, z: departure(c * near, c * z)):  # fmt: skip
        plain, other = (gradient(objective, c) for c in (1.0, factor))
        assert plain.abs().sum(1).min() > 0
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-5)


def test_the_departure_of_a_sure_prediction_has_a_direction():
    """In float32, against the formula in float64: by the class on top alone it is rounding."""
    z = torch.tensor([[30.0, 1.0, -2.0, 0.5, -20.0]])
    near = z + torch.tensor([[-0.01, 0.02, -0.03, 0.01, 0.3]])
    exact = near.double().requires_grad_(True)
    p, q = ((SPREAD * t / spread(z.double())).softmax(1) for t in (z.double(), exact))
    (p * (p / q).log()).sum().backward()
    own = near.clone().requires_grad_(True)
    departure(z, own).sum().backward()
    torch.testing.assert_close(own.grad.double() / exact.grad, torch.ones(1, 5).double(),
                               rtol=1e-3, atol=0)  # fmt: skip
    torch.testing.assert_close(
        divergence(SPREAD * z / spread(z), SPREAD * near / spread(z)), departure(z, near)[0]
    )


def test_trades_starts_within_the_images():
    x = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    start = trades(model(), x, Attack("linf", 0.1, 0.02, 0), rng())
    assert start.min() == 0 and start.max() == 1
    assert (start != x).double().mean() > 0.3


# ---- random starts


def test_the_linf_start_fills_the_ball_evenly():
    x = torch.full((500, 1, 8, 8), 0.5)
    delta = (random_start(x, LINF, rng()) - x) / LINF.eps
    shares = torch.histc(delta, 10, -1, 1) / delta.numel()
    assert (shares - 0.1).abs().max() < 0.01 and delta.abs().max() <= 1 + 1e-5


def test_the_l2_start_has_any_direction_and_an_even_radius():
    x = torch.full((4000, 1, 4, 4), 0.5)
    delta = (random_start(x, Attack("l2", 0.3, 0.1, 1), rng()) - x).flatten(1) / 0.3
    radius = delta.norm(dim=1)
    assert (torch.histc(radius, 10, 0, 1) / 4000 - 0.1).abs().max() < 0.02
    assert radius.max() <= 1 + 1e-5
    along = (delta / radius[:, None]).mean(0)
    assert along.abs().max() < 0.03, "directions that are not all alike"


def test_an_images_start_is_its_own():
    x = torch.full((6, 1, 8, 8), 0.5)
    for attack in (LINF, L2):
        together = random_start(x, attack, [generator_of(0, i) for i in range(6)])
        assert len(together.flatten(1).unique(dim=0)) == 6
        for i in (0, 5):
            alone = random_start(x[i : i + 1], attack, [generator_of(0, i)])
            assert torch.equal(alone[0], together[i])
        others = random_start(x, attack, [generator_of(1, i) for i in range(6)])
        assert not any(torch.equal(*pair) for pair in zip(together, others, strict=True))
    same = [generator_of(0, 3) for _ in range(6)]
    noise = drawn(torch.zeros(6, 1, 8, 8), uniform_within(1.0), same)
    assert torch.equal(noise[0], noise[5])


# ---- the batch, and bf16


@pytest.fixture
def split():
    x, y = digits()
    return Split((x[1600:] * 16).to(torch.uint8), y[1600:], 16)


def test_the_batch_does_not_matter(split):
    options = {"linf": (16 / 255,), "l2": (0.5,), "attacks": ("pgd-4-2", "apgd-ce-5", "apgd-t-2")}
    split = split.take(torch.arange(80))
    found = [evaluate(model(), split, resolve_evaluation("digits", options | {"batch_size": n}))
             for n in (80, 30, 9)]  # fmt: skip
    for other in found[1:]:
        for norm in ("linf", "l2"):
            ((eps, each),) = found[0]["each"][norm].items()
            for name, accuracy in each.items():
                assert abs(other["each"][norm][eps][name] - accuracy) <= 1.01 / 80, (norm, name)


def test_bf16_gradients_find_what_float32_ones_do_and_say_so(split):
    options = {"linf": (16 / 255,), "l2": (0.5,), "attacks": ("fgsm", "pgd-10", "apgd-ce-10",
               "apgd-t-5")}  # fmt: skip
    exact, fast = (evaluate(model(), split, resolve_evaluation("digits", options | {
        "precision": p})) for p in ("fp32", "bf16"))  # fmt: skip
    for norm in ("linf", "l2"):
        ((eps, each),) = exact["each"][norm].items()
        for name, accuracy in each.items():
            assert abs(fast["each"][norm][eps][name] - accuracy) <= 3.01 / 197, (norm, name)
            assert "gradients in bf16, judged in float32" in fast["configurations"][norm][eps][name]
            assert "bf16" not in exact["configurations"][norm][eps][name]
    assert fast["natural"] == exact["natural"] and "bf16" in report(fast)
    with pytest.raises(ValueError, match="'fp16'.*choose from fp32, bf16"):
        resolve_evaluation("digits", {"precision": "fp16"})


def test_only_the_gradients_are_made_in_bf16(split):
    seen, net = set(), copy.deepcopy(model())
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, args, out: seen.add((out.dtype, torch.is_grad_enabled())))
    evaluate(net, split, resolve_evaluation("digits", {
        "linf": (0.1,), "l2": (), "precision": "bf16", "attacks": ("pgd-1", "fgsm")}))  # fmt: skip
    assert (torch.bfloat16, True) in seen and (torch.bfloat16, False) not in seen
    assert (torch.float32, False) in seen


def test_what_bf16_finds_is_judged_by_the_model_itself(split):
    """Passes that call every answer wrong end no course early, and make no image fall."""
    x, y = held_out(60)

    def confused(x):
        logits = model()(x)
        return logits - 2 * logits.detach().amax(1, keepdim=True) * F.one_hot(logits.argmax(1), 10)

    for attack, more in ((apgd, {}), (apgd_targeted, {})):
        found, fooled = attack(confused, x, y, "linf", 0.06, 5, generator=rng(), judge=model(),
                               **more)  # fmt: skip
        with torch.no_grad():
            assert torch.equal(answers(model()(found)) != y, fooled)
    a = attempt("apgd-ce-5", "linf", 16 / 255, 10, 10, "bf16")
    stands, _ = withstand(model(), split, a.perturb, 1, 100, forward=confused)
    x, y = split.batch(slice(None))
    assert 0 < stands.sum() < left(x, y)


def test_the_model_stays_as_it_is(split):
    net = copy.deepcopy(model())
    before = {k: (v.clone(), v.dtype, v.stride()) for k, v in net.state_dict().items()}
    evaluate(net, split, resolve_evaluation("digits", {
        "linf": (0.1,), "l2": (), "precision": "bf16", "attacks": ("pgd-1",)}))  # fmt: skip
    for k, (value, dtype, stride) in before.items():
        now = net.state_dict()[k]
        assert torch.equal(now, value) and (now.dtype, now.stride()) == (dtype, stride)
