"""Adversaries, AWP and their combinations with SAM, against the formulas of their papers."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, kl_divergence

import fastsam
from bench.__main__ import main
from bench.attacks.objectives import LAST, SPREAD, spread
from bench.attacks.pgd import Attack, n_fgsm, trades
from bench.models import build_model
from bench.settings.config import check_used, resolve, values_of
from bench.settings.methods import ADVERSARIES, OPTIMIZERS, method_of, split_method
from bench.training import adversarial
from bench.training.adversarial import attacked, divergence, loss_of, watch_single_step
from bench.training.run import forward_of
from bench.training.step import another_batch, measure_full_gradient, step
from bench.training.train import set_up, train

EPS = 8 / 255


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(method, **options):
    options = {"width": 4, "epochs": 2, "batch_size": 64, "threads": 1} | options
    return resolve(method, "digits", options)


def started(method, **options):
    """A run on digits in training mode, and its first 32 images."""
    run = set_up(tiny(method, **options))
    run.model.train()
    return run, *run.data.train.batch(slice(0, 32))


@pytest.fixture
def model():
    model = build_model("smallconv", 4, 3, 5, [0.5] * 3, [0.25] * 3)
    with torch.no_grad():
        model(torch.rand(64, 3, 8, 8))
    return model.eval()


@pytest.fixture
def batch():
    x = torch.rand(16, 3, 8, 8, generator=rng(1))
    x[0], x[1] = 0.0, 1.0
    return x, torch.randint(0, 5, (16,), generator=rng(2))


def ascent(model, x, y):
    """The gradient of the cross-entropy of logits whose first is LAST above their third."""
    x = x.clone().requires_grad_(True)
    logits = model(x).double()
    loss = F.cross_entropy(LAST * logits / spread(logits), y)
    return torch.autograd.grad(loss, x)[0]


# ---- names


def test_methods_and_their_names():
    assert method_of(None, None) == "sgd" and method_of("standard", "sam") == "sam"
    assert method_of("at-linf", None) == "at-linf" == method_of("at-linf", "sgd")
    assert method_of("at-linf", "sam") == "at-linf+sam" == method_of("at-linf+sam", None)
    assert split_method("trades+fsam") == ("trades", "fsam") and split_method("asam") == (None,
                                                                                          "asam")
    for method, optimizer in (("sam", "fsam"), ("sgd", "sam"), ("at-linf+sam", "asam")):
        with pytest.raises(ValueError, match="contradict"):
            method_of(method, optimizer)
    for odd in ("adam", "sam+at-linf", "at-linf+", "+sam", "at-linf+sam+sam"):
        with pytest.raises(ValueError, match="unknown method"):
            method_of(odd, None)


def test_a_combination_has_the_values_of_both():
    config = resolve("at-linf+fsam", "cifar6k", {"device": "cpu"})
    assert (config.eps, config.attack_steps, config.rho, config.lmbda) == (4 / 255, 10, 0.2, 0.6)
    config = resolve("fgsm-rs", "sam-at-cifar10", {"eps": "4", "rho": 0.3})
    assert config.attack == Attack("linf", 4 / 255, 5 / 255, 1) and config.rho is None
    assert config.validation_attack.steps == 10
    assert resolve("n-fgsm", "sam-at-cifar10", {}).attack == Attack("linf", EPS, EPS, 1)
    check_used(["at-linf+sam"], {"rho": 0.1, "eps": "4"})
    with pytest.raises(ValueError, match="rho"):
        check_used(["at-linf", "trades"], {"rho": 0.1})


def test_eps_alone_takes_the_presets_share_of_it_as_alpha(capsys, tmp_path):
    """Not the preset's alpha, which could be four times the ball."""
    for method, eps, alpha in (("at-linf", "2", 0.5), ("trades+sam", "16/255", 4), ("at-l2", "0.25",
                               0.25 * 255 / 8)):  # fmt: skip
        attack = resolve(method, "sam-at-cifar10", {"eps": eps}).attack
        assert attack.alpha * 255 == pytest.approx(alpha, rel=1e-9)
        given = resolve(method, "sam-at-cifar10", {"eps": eps, "alpha": "1/255"}).attack
        assert (given.eps, given.alpha) == (attack.eps, 1 / 255)
    config = resolve("at-linf", "sam-at-cifar10", {})
    assert (config.eps, config.alpha) == (8 / 255, 2 / 255)
    command = ["train", "--method", "at-linf", "--width", "4", "--epochs", "1", "--eval-linf", "8",
               "--eval-l2", "0.5", "--eval-steps", "1", "--threads", "1"]  # fmt: skip
    assert main([*command, "--eps", "8", "--out", str(tmp_path / "a")]) == 0
    assert "at-linf: eps 8/255 = 0.03137 takes alpha 2/255 = 0.007843" in capsys.readouterr().err
    assert main([*command, "--eps", "8", "--alpha", "3", "--out", str(tmp_path / "b")]) == 0
    assert "takes alpha" not in capsys.readouterr().err


# ---- adversaries


def test_fgsm_rs_is_one_long_step_from_a_random_place_back_into_the_ball():
    run, x, y = started("fgsm-rs", eps="32")
    eps = 32 / 255
    start = (x + torch.empty_like(x).uniform_(-eps, eps, generator=rng(3))).clamp(0, 1)
    run.model.eval()
    delta = (start - x) + 1.25 * eps * ascent(run.model, start, y).sign()
    expected = (x + delta.clamp(-eps, eps)).clamp(0, 1)
    x_adv = attacked(run, forward_of(run), x, y, rng(3))
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-6)


def test_n_fgsm_starts_in_twice_the_ball_and_does_not_come_back(model, batch):
    x, y = batch
    noise = torch.empty_like(x).uniform_(-2 * EPS, 2 * EPS, generator=rng(3))
    start = (x + noise).clamp(0, 1)
    expected = (start + EPS * ascent(model, start, y).sign()).clamp(0, 1)
    x_adv = n_fgsm(model, x, y, Attack("linf", EPS, EPS, 1), rng(3))
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-7)
    radius = (x_adv - x).abs().max()
    assert 2 * EPS < radius <= 3 * EPS * (1 + 1e-5), "not one step beyond the start's ball"


def test_divergence_is_kullback_and_leiblers():
    p, q = (torch.randn(7, 5, dtype=torch.float64, generator=rng(i)) for i in range(2))
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean()
    torch.testing.assert_close(divergence(p, q), expected)


def test_trades_images_move_the_prediction_within_the_ball(model, batch):
    model, x = model.double(), batch[0].double()  # near x the divergence is small
    start = (x + 0.001 * torch.empty_like(x).normal_(generator=rng(3))).clamp(0, 1)
    assert torch.equal(trades(model, x, Attack("linf", EPS, EPS / 4, 0), rng(3)), start)
    x_adv = trades(model, x, Attack("linf", EPS, EPS / 4, 10), rng(3))
    assert (x_adv - x).abs().max() <= EPS * (1 + 1e-5)
    assert x_adv.min() >= 0 and x_adv.max() <= 1

    def moved(z):
        clean = model(x).detach()
        p, q = (Categorical(logits=SPREAD * logits / spread(clean)) for logits in (clean, model(z)))
        return kl_divergence(p, q).mean()

    with torch.no_grad():
        signs = torch.empty_like(x).uniform_(-1, 1, generator=rng(4)).sign()
        assert moved(x_adv) > 3 * moved((x + EPS * signs).clamp(0, 1))
    one = trades(model, x, Attack("linf", EPS, EPS / 4, 1), rng(3))
    z = start.clone().requires_grad_(True)
    moved(z).backward()
    expected = (x + (start - x + EPS / 4 * z.grad.sign()).clamp(-EPS, EPS)).clamp(0, 1)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-7)


def test_trades_loss_is_clean_cross_entropy_plus_beta_times_the_divergence():
    run, x, y = started("trades", beta=3.0)
    pairs = attacked(run, forward_of(run), x, y, rng())
    assert pairs.shape == (32, 2, 1, 8, 8) and torch.equal(pairs[:, 0], x)
    run.model.eval()  # so that the order of the passes is of no effect
    loss, logits = loss_of(run, forward_of(run), pairs, y)
    clean, adv = run.model(x), run.model(pairs[:, 1])
    away = kl_divergence(Categorical(logits=clean), Categorical(logits=adv)).mean()
    torch.testing.assert_close(loss, F.cross_entropy(clean, y) + 3 * away)
    torch.testing.assert_close(logits, adv)


@pytest.mark.parametrize("mode, passes_counted", [("eval", 0), ("train", 0), ("moving", 3)])
def test_what_the_attack_does_to_batchnorm(mode, passes_counted):
    run, x, y = started("at-linf", attack_bn=mode, attack_steps=3)
    modes, counter = [], run.model[1].features[1]
    counter.register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    attacked(run, forward_of(run), x, y, rng())
    assert counter.num_batches_tracked == passes_counted and run.model.training
    assert modes == [mode != "eval"] * 3


@pytest.mark.parametrize("mode, passes_counted", [("frozen", 1), ("moving", 2)])
def test_what_the_second_pass_does_to_batchnorm(mode, passes_counted):
    run, x, y = started("sam", second_bn=mode)
    step(run, forward_of(run), x, y)
    assert run.model[1].features[1].num_batches_tracked == passes_counted


# ---- combinations


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("optimizer", ["sam", "asam", "fishersam", "fsam", "fasam", "sam-part",
                                       "sam-micro", "adamw"])  # fmt: skip
def test_one_attack_a_step_and_every_pass_on_its_images(adversary, optimizer, monkeypatch):
    steps = {"attack_steps": 2} if "attack_steps" in values_of(adversary) else {}
    run, x, y = started(f"{adversary}+{optimizer}", **steps)
    attacks, seen = [], []
    perturbed, loss = adversarial.perturbed, loss_of
    monkeypatch.setattr(adversarial, "perturbed",
                        lambda *a: attacks.append(1) or perturbed(*a))
    monkeypatch.setattr("bench.training.step.loss_of", lambda *a: seen.append(a[2]) or loss(*a))
    w = [p.detach().clone() for p in run.model.parameters()]
    images = attacked(run, forward_of(run), x, y, rng())
    assert all(p.grad is None for p in run.model.parameters()), "the attack's gradients leak"
    step(run, forward_of(run), images, y)
    assert len(attacks) == 1
    whole = [images[:8]] * (optimizer == "sam-part") + [images] * (2 - (optimizer == "adamw"))
    expected = whole[: 2 if optimizer == "sam-part" else None]
    if optimizer == "sam-micro":
        expected = [part for part in images.tensor_split(4) for _ in range(2)]
    assert len(seen) == len(expected) and all(map(torch.equal, seen, expected))
    assert any(not torch.equal(p, old) for p, old in zip(run.model.parameters(), w, strict=True))


def gradient(run, w, x, y, beta=None):
    """The gradient at weights w of the cross-entropy on x, or of TRADES' loss on (x, x')."""
    with torch.no_grad():
        for p, value in zip(run.model.parameters(), w, strict=True):
            p.copy_(value)
    if beta is None:
        loss = F.cross_entropy(run.model(x), y)
    else:
        clean, adv = run.model(x[:, 0]), run.model(x[:, 1])
        p, log_q = clean.softmax(1), adv.log_softmax(1)
        loss = F.cross_entropy(clean, y) + beta * (p * (p.log() - log_q)).sum(1).mean()
    return list(torch.autograd.grad(loss, list(run.model.parameters())))


@pytest.mark.parametrize("method", ["at-linf+sam", "trades+sam"])
def test_a_step_is_sam_on_the_attacked_images(method):
    options = {"rho": 0.3, "lr": 0.2, "momentum": 0.0, "weight_decay": 0.03}
    run, x, y = started(method, **options)
    images = attacked(run, forward_of(run), x, y, rng())
    twin = set_up(run.config)
    w = [p.detach().clone() for p in run.model.parameters()]
    beta = 6.0 if method.startswith("trades") else None
    g = gradient(twin, w, images, y, beta)
    norm = sum(t.square().sum() for t in g).sqrt()
    g = gradient(twin, [p + 0.3 * t / norm for p, t in zip(w, g, strict=True)], images, y, beta)
    step(run, forward_of(run), images, y)
    for p, old, t in zip(run.model.parameters(), w, g, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.2 * (t + 0.03 * old), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["at-linf", "at-linf+sam", "trades"])
def test_awp_steps_from_weights_moved_layer_by_layer_and_moves_them_back(method):
    gamma, lr, wd, rho = 0.02, 0.2, 0.03, 0.3
    own = {"rho": rho} if "sam" in method else {}
    run, x, y = started(method, awp_gamma=gamma, lr=lr, momentum=0.9, weight_decay=wd, **own)
    images = attacked(run, forward_of(run), x, y, rng())
    twin, beta = set_up(run.config), 6.0 if method == "trades" else None
    w = [p.detach().clone() for p in run.model.parameters()]
    g = gradient(twin, w, images, y, beta)
    kernels = [p.ndim > 1 for p in w]
    assert 0 < sum(kernels) < len(kernels)
    moves = [gamma * p.norm() / t.norm() * t if k else torch.zeros_like(p)
             for p, t, k in zip(w, g, kernels, strict=True)]  # fmt: skip
    moved = [p + m for p, m in zip(w, moves, strict=True)]
    g = gradient(twin, moved, images, y, beta)
    if own:
        norm = sum(t.square().sum() for t in g).sqrt()
        climbed = [p + rho * t / norm for p, t in zip(moved, g, strict=True)]
        g = gradient(twin, climbed, images, y, beta)
    step(run, forward_of(run), images, y)
    for p, old, new, t in zip(run.model.parameters(), w, moved, g, strict=True):
        torch.testing.assert_close(p.detach(), old - lr * (t + wd * new), rtol=1e-4, atol=1e-6)
    assert run.model[1].features[1].num_batches_tracked == (2 if method == "trades" else 1)
    assert all(p.grad is None for p in run.model.parameters())


def test_awp_waits_for_its_first_epoch(tmp_path):
    plain, late, early = (
        [row["train_loss"] for row in train(tiny("at-linf", attack_steps=1, **awp),
                                            tmp_path / name).history]
        for name, awp in (("plain", {}), ("late", {"awp_gamma": 0.01, "awp_warmup": 1}),
                          ("early", {"awp_gamma": 0.01}))
    )  # fmt: skip
    assert plain[0] == late[0] != early[0] and plain[1] != late[1]


@pytest.mark.parametrize("optimizer", ["adamw", "sam", "fsam"])
def test_adamw_is_the_base_where_asked(optimizer):
    run, x, y = started(optimizer, **({} if optimizer == "adamw" else {"base": "adamw", "rho": 0.0,
                        "sigma": 1.0}), lr=0.01, weight_decay=0.1)  # fmt: skip
    twin = set_up(run.config)
    exact = torch.optim.AdamW(twin.model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        step(run, forward_of(run), x, y)
        exact.zero_grad()
        F.cross_entropy(twin.model(x), y).backward()
        exact.step()
    for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_every_optimizer_has_a_builder():
    for optimizer in OPTIMIZERS:
        run = set_up(tiny(optimizer, epochs=4))
        assert type(run.opt).__module__.startswith("fastsam" if run.config.rho else "torch")


def in_float64(run, x):
    """A twin of the run in float64, its weights, and the images."""
    twin = set_up(run.config)
    twin.model.double().train()
    return twin, [p.detach().clone() for p in twin.model.parameters()], x.double()


def dot(a, b):
    return sum((s * t).sum() for s, t in zip(a, b, strict=True))


def assert_stepped(run, w, gradients, lr=0.2, decay=0.03):
    for p, old, t in zip(run.model.parameters(), w, gradients, strict=True):
        expected = old - lr * (t + decay * old)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection", ["cosine", "orthogonal"])
@pytest.mark.parametrize("method", ["sam-full", "sam-noise"])
def test_a_step_climbs_by_its_part_of_the_gradient(method, projection):
    options = {"rho": 0.3, "lr": 0.2, "momentum": 0.0, "weight_decay": 0.03, "full_every": 2}
    run, x, y = started(method, projection=projection, val=0.9, **options)
    twin, w, images = in_float64(run, x)
    n = len(run.data.train)
    assert 64 < n < 256  # more than one batch
    full = [torch.zeros_like(p) for p in w]
    for part in torch.arange(n).split(64):
        g = gradient(twin, w, *(t.double() if t.is_floating_point() else t
                                for t in run.data.train.batch(part)))  # fmt: skip
        full = [f + t * len(part) / n for f, t in zip(full, g, strict=True)]
    for _ in range(2):  # the second step keeps the first one's G
        w = [p.detach().double() for p in run.model.parameters()]
        g = gradient(twin, w, images, y)
        c = dot(g, full) / dot(full, full)
        if projection == "cosine":
            c = dot(g, full) / (dot(g, g) * dot(full, full)).sqrt()
        d = [c * f for f in full]
        if method == "sam-noise":
            d = [t - s for t, s in zip(g, d, strict=True)]
        climbed = [p + 0.3 * t / dot(d, d).sqrt() for p, t in zip(w, d, strict=True)]
        step(run, forward_of(run), x, y)
        assert_stepped(run, w, gradient(twin, climbed, images, y))


def test_the_full_gradient_is_measured_at_every_so_many_th_step(monkeypatch):
    run, x, y = started("sam-full", full_every=3, val=0.9)
    measured, measure = [], measure_full_gradient
    monkeypatch.setattr("bench.training.step.measure_full_gradient",
                        lambda run: measured.append(i) or measure(run))  # fmt: skip
    before = {k: b.clone() for k, b in run.model.named_buffers()}
    measure(run)
    assert all(torch.equal(b, before[k]) for k, b in run.model.named_buffers())
    for i in range(7):  # noqa: B007 read by the lambda
        step(run, forward_of(run), x, y)
    assert measured == [0, 3, 6]


def test_sam_db_climbs_by_another_batch(monkeypatch):
    options = {"rho": 0.3, "lr": 0.2, "momentum": 0.0, "weight_decay": 0.03}
    run, x, y = started("sam-db", **options)
    drawn, draw = [], another_batch
    monkeypatch.setattr("bench.training.step.another_batch",
                        lambda *a: drawn.append(draw(*a)) or drawn[-1])
    twin, w, images = in_float64(run, x)
    loss, _ = step(run, forward_of(run), x, y)
    ((other_x, other_y),) = drawn
    assert other_x.shape == x.shape and not torch.equal(other_x, x)
    g = gradient(twin, w, other_x.double(), other_y)
    climbed = [p + 0.3 * t / dot(g, g).sqrt() for p, t in zip(w, g, strict=True)]
    assert_stepped(run, w, gradient(twin, climbed, images, y))
    assert loss == pytest.approx(F.cross_entropy(twin.model(images), y).item(), rel=1e-4)


def test_sam_batches_climbs_by_several_batches(monkeypatch):
    options = {"rho": 0.3, "lr": 0.2, "momentum": 0.0, "weight_decay": 0.03}
    run, x, y = started("sam-batches", ascent_batches=3, **options)
    drawn, draw = [], another_batch
    monkeypatch.setattr("bench.training.step.another_batch",
                        lambda *a: drawn.append(draw(*a)) or drawn[-1])
    twin, w, images = in_float64(run, x)
    loss, _ = step(run, forward_of(run), x, y)
    ((more_x, more_y),) = drawn
    assert len(more_x) == 2 * len(x)
    g = gradient(twin, w, torch.cat([images, more_x.double()]), torch.cat([y, more_y]))
    climbed = [p + 0.3 * t / dot(g, g).sqrt() for p, t in zip(w, g, strict=True)]
    assert_stepped(run, w, gradient(twin, climbed, images, y))
    assert loss == pytest.approx(F.cross_entropy(twin.model(images), y).item(), rel=1e-4)


@pytest.mark.parametrize("method", ["fsam", "fasam"])
def test_the_convention_is_friendly_sams(method):
    found = {}
    for convention in (None, "algorithm1", "official"):
        run, x, y = started(method, convention=convention, sigma=0.7, lr=0.2, rho=0.5)
        twin = set_up(run.config)
        opt = fastsam.FriendlySAM(
            twin.model.parameters(), torch.optim.SGD, rho=0.5, sigma=0.7, lmbda=run.config.lmbda,
            adaptive=method == "fasam", convention=convention or "algorithm1", lr=0.2,
            momentum=run.config.momentum, weight_decay=run.config.weight_decay,
        )  # fmt: skip
        twin.opt = opt
        for _ in range(3):
            for one in (run, twin):
                step(one, forward_of(one), x, y)
        found[convention] = [p.detach().clone() for p in run.model.parameters()]
        for p, q in zip(found[convention], twin.model.parameters(), strict=True):
            assert torch.equal(p, q)
    assert all(torch.equal(a, b) for a, b in zip(found[None], found["algorithm1"], strict=True))
    assert any(not torch.equal(a, b) for a, b in
               zip(found["official"], found["algorithm1"], strict=True))  # fmt: skip
    with pytest.raises(ValueError, match="algorithm1, official"):
        tiny("fsam", convention="papers")
    assert tiny("sam", convention="official").convention is None


def test_methods_with_other_images_refuse_what_they_would_ignore():
    for method in ("at-linf+sam-full", "at-linf+sam-db"):
        with pytest.raises(ValueError, match="leave out the adversary"):
            resolve(method, "digits", {})
    with pytest.raises(ValueError, match="use bf16 or off"):
        tiny("sam-noise", amp="fp16")
    with pytest.raises(ValueError, match="full_every must be at least 1"):
        tiny("sam-full", full_every=0)


# ---- catastrophic overfitting


class Masked(nn.Module):
    """A network that one long step does not fool and several short ones do.

    The margin of grey images is lowest half-way to the ball's border, which a step of 1.25 eps
    from half of all starting places passes over; at the border the answer is right.
    """

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        off = (x - 0.5).abs() / self.eps
        margin = ((off - 0.5).square() - 0.08).mean((1, 2, 3))
        return torch.stack([margin, -margin], 1)


def test_catastrophic_overfitting_is_seen_and_warned_of():
    run = set_up(tiny("fgsm-rs", eps="32"))
    grey = run.data.val.images.new_full((100, 1, 16, 16), 8)  # of 16 levels: 0.5
    run.data.val = type(run.data.val)(grey, torch.zeros(100, dtype=torch.long), 16)
    run.model = Masked(run.config.eps)
    with pytest.warns(UserWarning, match="catastrophic overfitting"):
        row = watch_single_step(run)
    assert row["single_step_acc"] > 0.9 and row["pgd_acc"] < 0.1


@pytest.mark.parametrize("right, kept, told", [(60, 25, True), (60, 35, False), (30, 12, False)])
def test_from_where_on_overfitting_is_catastrophic(right, kept, told, monkeypatch, recwarn):
    """Half of what one step leaves, and a fifth of all, must be lost."""
    run = set_up(tiny("fgsm-rs"))
    run.data.val = run.data.train.take(torch.arange(100))
    first = torch.arange(100)
    answers = torch.where(first < right, run.data.val.labels, -1)
    monkeypatch.setattr(adversarial, "judged", lambda *a: answers)
    monkeypatch.setattr(adversarial, "robust", lambda *a, **k: first < kept)
    row = watch_single_step(run)
    assert (row["single_step_acc"], row["pgd_acc"]) == (right / 100, kept / 100)
    assert any("catastrophic" in str(w.message) for w in recwarn.list) == told


@pytest.mark.parametrize("method, val", [("fgsm-rs", 0.1), ("n-fgsm", 0.0)])
def test_single_step_runs_log_both_accuracies(method, val, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a network this fresh has not overfitted
        run = train(tiny(method, val=val, epochs=1), tmp_path)
    assert 0 <= run.history[0]["pgd_acc"] <= run.history[0]["single_step_acc"] + 0.05 <= 1.05
    assert ("val_acc" in run.history[0]) == (val > 0)
    assert watch_single_step(set_up(tiny("at-linf"))) == {}
