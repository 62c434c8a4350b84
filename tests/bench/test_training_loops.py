"""The loops whose speed is measured: their mathematics beside slow code, what they wait for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.attacks.objectives import rising, spread
from bench.attacks.pgd import Attack, pgd
from bench.data.augmentation import decide
from bench.models import build_model
from bench.speed import plain_recipe, throughput, training_loops

from ..helpers.loops import METHODS, OPTIONS, RELATIVES, one_image, rng, tiny_config


def slow_training(config, data, steps):
    """Train in float64 and NCHW with nothing of bench's loops: image after image, weight after
    weight, the formulas as the papers print them. Returns losses and weights."""
    torch.manual_seed(config.seed)
    model = build_model("smallconv", config.width, 3, 10, data.mean, data.std).double()
    ps = list(model.parameters())
    v, m = ([torch.zeros_like(p) for p in ps] for _ in range(2))
    batch_rng, attack_rng = (rng(config.seed + i) for i in range(2))
    augmentation, losses = OPTIONS.augmentation(config), []
    order = torch.randperm(len(data.train), generator=batch_rng)

    def gradients(x, y):
        loss = F.cross_entropy(model(x), y)
        return loss.item(), torch.autograd.grad(loss, ps)

    for step in range(steps):
        index = order[8 * step : 8 * (step + 1)]
        moved, y = decide(8, 8, 8, augmentation, batch_rng), data.train.labels[index]
        x = torch.stack([
            torch.from_numpy(one_image(data.train.images[k], i, moved, augmentation, None, 255))
            for i, k in enumerate(index)
        ]).to(memory_format=torch.channels_last)  # fmt: skip
        if config.attack is not None:
            x_adv = x + torch.empty_like(x).uniform_(-config.eps, config.eps, generator=attack_rng)
            x, x_adv = x.double(), x_adv.clamp(0, 1).double()
            model.eval()
            for i in range(config.attack_steps):
                x_adv.requires_grad_()
                z = model(x_adv)
                loss = F.cross_entropy(rising(i, config.attack_steps) * z / spread(z), y)
                (g,) = torch.autograd.grad(loss, x_adv)
                x_adv = x_adv.detach() + config.alpha * g.sign()
                x_adv = x_adv.clamp(x - config.eps, x + config.eps).clamp(0, 1)
            x = x_adv
            model.train()
        x = x.double()
        loss, gs = gradients(x, y)
        losses.append(loss)
        if config.rho is not None:
            statistics = [b.clone() for b in model.buffers()]
            ds = gs
            if config.lmbda is not None:
                for e, g in zip(m, gs, strict=True):
                    e.mul_(config.lmbda).add_((1 - config.lmbda) * g)
                ds = [g - config.sigma * e for g, e in zip(gs, m, strict=True)]
            adaptive = config.method in ("asam", "fasam")
            Ts = [p.detach().abs() if adaptive else 1.0 for p in ps]
            norm = sum((T * d).square().sum() for T, d in zip(Ts, ds, strict=True)) ** 0.5
            saved = [p.detach().clone() for p in ps]
            with torch.no_grad():
                for p, T, d in zip(ps, Ts, ds, strict=True):
                    p += config.rho * T * T * d / norm
            _, gs = gradients(x, y)
            with torch.no_grad():
                for p, w in zip(ps, saved, strict=True):
                    p.copy_(w)
            for b, old in zip(model.buffers(), statistics, strict=True):
                b.copy_(old)
        with torch.no_grad():
            for p, g, u in zip(ps, gs, v, strict=True):
                u.mul_(config.momentum).add_(g + config.weight_decay * p)
                p -= config.lr * u
    return losses, {k: t for k, t in model.state_dict().items() if t.is_floating_point()}


@pytest.mark.parametrize("method", METHODS[:-1])
def test_fast_loop_trains_the_same_network_as_slow_code(method):
    config, data = tiny_config(method), training_loops.random_data(OPTIONS)
    loop = training_loops.fast_loop(config, data, OPTIONS)
    start = {k: t.clone() for k, t in loop.model.state_dict().items()}
    # where a gradient is 0 up to rounding an attack may step either way: few steps, few of these
    steps, losses, update = 2 if config.attack else 6, [], loop.update

    def listening(x, y):
        result = update(x, y)
        losses.append(result[0].item())
        return result

    loop.update = listening
    for _ in range(steps):
        loop.step()
    slow_losses, slow = slow_training(config, data, steps)
    assert losses == pytest.approx(slow_losses, rel=1e-5)
    for name, exact in slow.items():
        way = (exact - start[name]).norm()
        assert (loop.model.state_dict()[name] - exact).norm() <= 1e-4 * way, name
    assert loop.sums[0].item() == pytest.approx(8 * sum(slow_losses), rel=1e-5)
    assert 0 <= loop.sums[1] <= 8 * steps


@pytest.mark.parametrize("method", METHODS + RELATIVES)
def test_parity_sees_what_is_right(method):
    errors = training_loops.disagreement(tiny_config(method, amp="bf16"), OPTIONS)
    for part, allowed in training_loops.TOLERANCE.items():
        assert errors[part] <= allowed / 10, part
    assert (errors["attack"] > 0) == method.startswith("at")
    assert 0 < errors["precision"] < 0.01, "bf16's losses are float32's, or far from them"


@pytest.mark.parametrize(
    "method, name, factor",
    [("sgd", "weight_decay", 1.02), ("sgd", "momentum", 1.02), ("sam", "rho", 1.02),
     ("asam", "rho", 1.02), ("fsam", "lmbda", 1.02), ("fsam", "sigma", 1.02),
     ("at-linf", "eps", 1.02), ("at-linf", "alpha", 1.05), ("at-l2", "eps", 1.02),
     ("msam", "rho", 1.02), ("looksam", "look_alpha", 1.02), ("looksam", "interval", 2),
     ("gsam", "gsam_alpha", 1.02)],
)  # fmt: skip
def test_parity_sees_what_is_wrong(method, name, factor):
    def wrong_loop(config, *rest):
        wrong = replace(config, **{name: factor * getattr(config, name)})
        return training_loops.fast_loop(wrong, *rest)

    errors = training_loops.disagreement(tiny_config(method), OPTIONS, wrong_loop)
    part = "attack" if method.startswith("at") else "training"
    assert errors[part] > 3 * training_loops.TOLERANCE[part]


@pytest.mark.parametrize("method", ["sgd", "fsam", "at-linf"])
def test_graph_loop_trains_the_same_network(method, device):
    """The attack's random start is the device's own here, so its images are left out."""
    config = replace(tiny_config(method, amp="bf16"), eps=None, device=str(device))
    errors = training_loops.disagreement(config, OPTIONS, training_loops.graph_loop)
    assert errors["training"] <= training_loops.TOLERANCE["training"] / 10
    assert 0 < errors["precision"] < 0.01
    config = replace(tiny_config(method), device=str(device))
    loop = training_loops.graph_loop(config, training_loops.random_data(OPTIONS), OPTIONS)
    start = training_loops.state(loop.model)
    loop.step()
    assert not torch.equal(start, training_loops.state(loop.model))
    assert throughput.breakdown(loop, 1, device) is None


class NoHostReads(TorchDispatchMode):
    """Raises where a value of the device would be read by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"the host waits for {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS + RELATIVES)
def test_the_loop_never_waits_for_the_device(method):
    options = replace(OPTIONS, cutout=4)
    loop = training_loops.fast_loop(
        tiny_config(method, amp="bf16"), training_loops.random_data(options), options
    )
    loop.step()  # whatever is allocated or read once
    with NoHostReads():
        loop.step()
        with pytest.raises(AssertionError, match="waits"):
            loop.sums[0].item()


def test_plain_attack_finds_the_same_images_and_leaves_no_gradient():
    torch.manual_seed(0)
    model = build_model("smallconv", 4, 3, 5, [0.5] * 3, [0.25] * 3).double()
    x, y = torch.rand(16, 3, 8, 8, dtype=torch.double), torch.randint(0, 5, (16,))
    model(x)
    for method, bn in [("at-linf", "eval"), ("at-l2", "eval"), ("at-linf", "train")]:
        config = tiny_config(method, attack_bn=bn)
        before = {k: t.clone() for k, t in model.state_dict().items()}
        out = plain_recipe.attacked(config, model, x, y, rng(2))
        assert model.training and all(p.grad is None for p in model.parameters())
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
        model.train(bn == "train")
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0
        expected = pgd(model, x, y, config.attack, rng(2))
        model.train()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        assert (out - x).abs().max() > 0.5 * config.alpha


def test_plain_l2_step_of_a_hand_made_image():
    x = torch.full((1, 1, 1, 2), 0.5)
    step = plain_recipe.climb(x, torch.tensor([[[[3.0, 4.0]]]]), x, Attack("l2", 0.1, 0.25, 1))
    torch.testing.assert_close(step, torch.tensor([[[[0.56, 0.58]]]]))


def test_attack_needs_no_weight_gradients_but_gives_them_back():
    config = tiny_config("at-linf")
    loop = training_loops.fast_loop(config, training_loops.random_data(OPTIONS), OPTIONS)
    seen, (x, y) = [], loop.batch()
    loop.model[1].register_forward_pre_hook(
        lambda module, _: seen.append(any(p.requires_grad for p in module.parameters()))
    )
    loop.attack(x, y)
    assert seen == [False] * 3
    assert all(p.requires_grad and p.grad is None for p in loop.model.parameters())


@pytest.mark.parametrize("name", ["fast", "eager"])
@pytest.mark.parametrize("method, passes", [("sgd", 5), ("msam", 5), ("looksam", 6), ("gsam", 10)])
def test_passes_of_five_steps(method, passes, name):
    loop = training_loops.fast_loop(
        tiny_config(method), training_loops.random_data(OPTIONS), OPTIONS, name
    )
    seen = []
    loop.model.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        seen.clear()
        throughput.take_turn(loop, 5, torch.device("cpu"))
        assert len(seen) == passes


@pytest.mark.long
def test_compiled_loop_trains_the_same_network():
    from bench.speed.baselines import why_not_compile

    if obstacle := why_not_compile(torch.device("cpu")):
        pytest.skip(f"torch.compile does not work here: {obstacle}")
    options = replace(OPTIONS, compile=True)
    errors = training_loops.disagreement(tiny_config("at-linf", amp="off"), options)
    for part, allowed in training_loops.TOLERANCE.items():
        assert errors[part] <= allowed / 10, part
