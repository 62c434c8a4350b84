"""The fast loop: its augmentation, its mathematics beside slow code, its waits, and its command."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.__main__ import main
from bench.attacks.objectives import rising, spread
from bench.attacks.pgd import Attack, pgd
from bench.data.augmentation import Augmentation, Decisions, Pipeline, decide, gather
from bench.models import build_model
from bench.settings.config import resolve
from bench.speed import plain_recipe, throughput, training_loops

TINY = ["--model", "smallconv", "--width", "4", "--batch-size", "8", "--images", "40",
        "--image-size", "8", "--threads", "1", "--workers", "0", "--attack-steps", "2",
        "--turns", "2"]  # fmt: skip
METHODS = ["sgd", "sam", "asam", "fsam", "fasam", "at-linf", "at-l2"]
RELATIVES = ["msam", "looksam", "gsam"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n=12, c=3, h=9, w=7, levels=255):
    images = torch.randint(0, levels + 1, (n, c, h, w), generator=rng(5), dtype=torch.uint8)
    return images, torch.arange(n)


def one_image(image, i, moved, augmentation, fill, levels):
    """Augment image (C, H, W) by the i-th decision, in numpy: pad, slice, mirror, overwrite."""
    _, h, w = image.shape
    pad = augmentation.pad
    mode = {"reflect": "reflect", "zero": "constant"}[augmentation.padding]
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode)
    top, left = pad + int(moved.down[i]), pad + int(moved.right[i])
    out = padded[:, top : top + h, left : left + w]
    if augmentation.flip and moved.mirrored[i]:
        out = out[:, :, ::-1]
    out = out.astype(np.float32) / np.float32(levels)
    if augmentation.cutout and moved.cut[i]:
        for y in range(h):
            for x in range(w):
                from_top = y - (int(moved.cut_row[i]) - augmentation.cutout // 2)
                from_left = x - (int(moved.cut_col[i]) - augmentation.cutout // 2)
                if 0 <= from_top < augmentation.cutout and 0 <= from_left < augmentation.cutout:
                    out[:, y, x] = fill
    return out


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cutout", [0, 3, 4])
@pytest.mark.parametrize("levels, channels", [(255, 3), (16, 1)])
def test_augmentation_is_bit_equal_to_image_after_image(padding, flip, cutout, levels, channels):
    images, labels = random_images(c=channels, levels=levels)
    augmentation = Augmentation(pad=4, padding=padding, flip=flip, cutout=cutout)
    fill = [0.1, 0.2, 0.3][:channels]
    pipeline = Pipeline(images, labels, levels, augmentation, fill)
    seen, draws = set(), rng()
    for seed in range(20):
        index = torch.randperm(len(images), generator=draws)[:8]
        moved = decide(8, 9, 7, augmentation, rng(seed))
        x, y = pipeline.batch(index, rng(seed))
        assert torch.equal(y, labels[index]) and x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        for i, k in enumerate(index):
            one = one_image(images[k], i, moved, augmentation, fill, levels)
            assert np.array_equal(x[i].numpy(), one), moved
            seen.add((int(moved.down[i]), int(moved.right[i])))
    assert len(seen) > 60, "some of the 81 crops never occur"


def test_decisions_are_random_in_every_part_and_repeat():
    augmentation = Augmentation(pad=2, cutout=4)
    moved, again, other = (decide(4000, 9, 7, augmentation, rng(s)) for s in (0, 0, 1))
    for name, values in zip(Decisions._fields, moved, strict=True):
        assert torch.equal(values, getattr(again, name))
        assert not torch.equal(values, getattr(other, name)), name
        count = torch.unique(values, return_counts=True)[1].double()
        chances = {"mirrored": 2, "cut": 2, "cut_row": 9, "cut_col": 7}.get(name, 5)
        assert len(count) == chances
        assert (count / 4000 - 1 / chances).abs().max() < 0.04, f"{name} is not uniform"


def test_training_still_draws_what_it_drew():
    """Crops down, crops right, mirror images, in this order: old runs can be repeated."""
    images, labels = random_images(n=30)
    pipeline = Pipeline(images, labels, 1, Augmentation(3), [0.0] * 3)
    out, _ = next(pipeline.augmented([labels], rng(1)))
    draws = rng(1)
    down, right = (torch.randint(-3, 4, (30, 1), generator=draws) for _ in range(2))
    moved = Decisions(down, right, torch.rand(30, 1, generator=draws) < 0.5)
    for i in range(30):
        one = one_image(images[i], i, moved, Augmentation(3), None, 1)
        assert np.array_equal(out[i].numpy(), one)


def test_an_epoch_has_every_image_once_and_full_batches_only():
    images, labels = random_images(n=20)
    pipeline = Pipeline(images, labels, 255, None, [0.0] * 3)
    epochs = [list(pipeline.batches(6, rng(seed))) for seed in (0, 1)]
    for batches in epochs:
        assert [len(y) for _, y in batches] == [6, 6, 6]
        order = torch.cat([y for _, y in batches])
        assert len(order.unique()) == 18
        for x, y in batches:
            assert torch.equal(x, images[y].float() / 255)
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def test_gather_of_no_decision_is_the_image():
    images, _ = random_images()
    nothing = Decisions(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long))
    nhwc, index = images.permute(0, 2, 3, 1), torch.tensor([7, 0, 7])
    for padding in ("reflect", "zero"):
        assert torch.equal(gather(nhwc, index, nothing, padding), nhwc[index])


@pytest.mark.parametrize(
    "values, said",
    [({"pad": -1}, "-1"), ({"cutout": -2}, "-2"), ({"padding": "mirror"}, "reflect, zero")],
)
def test_refused_augmentations(values, said):
    with pytest.raises(ValueError, match=said):
        Augmentation(**values)


def test_reflection_of_more_than_the_image_is_refused():
    images, labels = random_images()
    with pytest.raises(ValueError, match="at most 6"):
        Pipeline(images, labels, 255, Augmentation(pad=7), [0.0] * 3)
    Pipeline(images, labels, 255, Augmentation(pad=7, padding="zero"), [0.0] * 3)


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("cutout", [0, 4])
def test_plain_transform_makes_images_of_the_same_kind(padding, cutout):
    """Every image that torchvision's transforms make is one that some decision makes."""
    image = random_images(n=1, h=6, w=6)[0]
    augmentation = Augmentation(pad=1, padding=padding, cutout=cutout)
    transform = plain_recipe.transform_of(augmentation, (6, 6), [0.5] * 3)
    images = plain_recipe.Images(image.permute(0, 2, 3, 1).numpy(), [3], transform)
    zero = torch.zeros(1, 1, dtype=torch.long)
    squares = [(False, 0, 0)]
    squares += [(True, y, x) for y in range(6) for x in range(6)] if cutout else []
    possible = {}
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            for mirrored in (False, True):
                for cut, y, x in squares:
                    moved = Decisions(zero + down, zero + right, zero == int(not mirrored),
                                      zero == int(not cut), zero + y, zero + x)  # fmt: skip
                    one = one_image(image[0], 0, moved, augmentation, [0.5] * 3, 255)
                    possible[one.tobytes()] = (down, right, mirrored, cut)
    seen = set()
    for _ in range(200):
        x, y = images[0]
        assert y == 3 and x.numpy().tobytes() in possible
        seen.add(possible[x.numpy().tobytes()][:3])
    assert len(seen) == 18
    assert not cutout or len({possible[images[0][0].numpy().tobytes()][3] for _ in range(50)}) == 2


def tiny_config(method, **options):
    options = {"model": "smallconv", "width": 4, "batch_size": 8, "attack_steps": 3, "lr": 0.3,
               "momentum": 0.8, "weight_decay": 0.05, "channels_last": True} | options  # fmt: skip
    if not method.startswith("at"):
        options.pop("attack_steps")
    return replace(resolve(method, "sam-at-cifar10", options), data="random")


OPTIONS = training_loops.Options(images=48, image_size=8, workers=0)


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


@pytest.mark.parametrize("name, last", [("fast", "step"), ("eager", "second_step")])
def test_breakdown_adds_up_and_leaves_the_loop_as_it_was(name, last, monkeypatch):
    """On a clock that ticks only where the test says so."""
    loop = training_loops.fast_loop(
        tiny_config("sam"), training_loops.random_data(OPTIONS), OPTIONS, name
    )
    now = [0.0]
    monkeypatch.setattr(throughput, "time", clocks(lambda: now[0]))

    def slower(owner, name, seconds):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            now[0] += seconds
            return real(*args, **kwargs)

        setattr(owner, name, call)
        return call

    calls = [slower(loop, "batch", 1), slower(loop, "attack", 2), slower(loop, "update", 4),
             slower(loop.opt, "first_step", 8), slower(loop.opt, last, 16)]  # fmt: skip
    parts = throughput.breakdown(loop, 3, torch.device("cpu"))
    assert parts == pytest.approx({"data": 1e3, "attack": 2e3, "forward and backward": 4e3,
                                   "climb": 8e3, "return and step": 16e3})  # fmt: skip
    assert calls == [loop.batch, loop.attack, loop.update, loop.opt.first_step,
                     getattr(loop.opt, last)]  # fmt: skip


def clocks(now, processor=lambda: 0.0):
    return SimpleNamespace(perf_counter=now, process_time=processor)


class Timed:
    """A loop of steps that take as long as it is told, by the clock and of the processor."""

    def __init__(self, name, method, now, seconds, processor, order):
        self.name, self.config = name, SimpleNamespace(method=method, batch_size=10)
        self.prefetched, self.now, self.order = 0, now, order
        self.durations = zip(seconds, processor, strict=True)

    def step(self):
        self.order.append(self.name)
        for i, duration in enumerate(next(self.durations)):
            self.now[i] += duration


def test_race_takes_turns_and_compares_within_each(monkeypatch):
    now, order = [0.0, 0.0], []
    monkeypatch.setattr(throughput, "time", clocks(lambda: now[0], lambda: now[1]))
    monkeypatch.setattr(throughput, "breakdown", lambda *_: None)
    # two steps a turn, the first turn warms up
    loops = [Timed("a", "sgd", now, [100, 100, 1, 3, 2, 2, 5, 5], [9, 9, 1, 1, 2, 2, 3, 3], order),
             Timed("b", "msam", now, [100, 100, 2, 6, 9, 9, 10, 20], [9] * 8, order),
             Timed("c", "msam", now, [100, 100, 4, 12, 9, 9, 1, 2], [18] * 8, order)]
    sgd, fast, slow = throughput.race(loops, 2, 3, torch.device("cpu"))
    assert order == ["a", "a", "b", "b", "c", "c"] * 4
    assert sgd["images_per_second"] == 2 * 10 / 4 and sgd["fast_is_faster"] == 1
    assert sgd["times_sgd"] == {"clock": 1, "processor": 1} and sgd["processor_ms"] == 2e3
    assert sgd["step_ms"] == {"p20": 2e3, "p50": 2.5e3, "p80": 5e3}
    assert fast["images_per_second"] == 2 * 10 / 18 and fast["fast_is_faster"] == 1
    assert fast["times_sgd"] == {"clock": 3, "processor": 4.5}, "turn by turn 2, 4.5, 3; 9, 4.5, 3"
    assert slow["fast_is_faster"] == 1, "of its own method's first, turn by turn 2, 1, 0.1"


def test_a_turn_is_whole_periods():
    configs = [tiny_config("sgd"), tiny_config("looksam")]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert throughput.steps_of_a_turn(configs[:1], OPTIONS, cpu) == 1
    assert throughput.steps_of_a_turn(configs, OPTIONS, cpu) == 5
    assert throughput.steps_of_a_turn(configs, OPTIONS, gpu) == 30
    assert throughput.steps_of_a_turn([replace(configs[1], interval=4)], OPTIONS, gpu) == 32
    with pytest.raises(ValueError, match="steps 7 end within a period of 5"):
        throughput.steps_of_a_turn(configs, replace(OPTIONS, steps=7), cpu)
    assert throughput.steps_of_a_turn(configs[:1], replace(OPTIONS, steps=7), cpu) == 7


def test_the_relatives_beside_sgd(tmp_path, capsys):
    """Passes, as hooks count them in whole turns, and rows."""
    rows = tmp_path / "rows.jsonl"
    assert main(["throughput", *TINY, "--methods", "sgd", *RELATIVES, "--beside", "plain",
                 "--turns", "1", "--rows", str(rows)]) == 0
    printed = capsys.readouterr().out
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["method"], row["loop"]) for row in found] == [
        (method, loop) for method in ("sgd", *RELATIVES) for loop in ("fast", "plain")]
    for row in found:
        assert row["steps"] == 5 and row["processor_ms"] > 0
        assert f"{row['times_sgd']['processor']:.3f}" in printed


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


def test_command_leaves_rows_of_every_loop(tmp_path, capsys):
    path = tmp_path / "new" / "rows.jsonl"
    command = ["throughput", *TINY, "--methods", "sgd", "fsam", "at-linf", "--cutout", "4",
               "--beside", "eager", "fp32", "fp32-nchw", "plain", "--rows", str(path)]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {method: [] for method in ("sgd", "fsam", "at-linf")}
    for row in rows:
        found[row["method"]].append(row["loop"])
    every = ["fast", "fp32", "fp32-nchw", "plain"]
    assert found == {"sgd": every, "fsam": ["fast", "eager", *every[1:]], "at-linf": every}
    for row in rows:
        assert row.keys() >= {"versions", "git", "device", "threads", "time", "data", "options"}
        assert row["config"]["data"] == "random" and row["options"]["turns"] == 2
        assert row["step_ms"]["p20"] <= row["step_ms"]["p50"] <= row["step_ms"]["p80"]
        parts = row["breakdown_ms"]
        assert (parts["climb"] > 0) == (row["method"] == "fsam")
        assert min(parts[name] for name in ("data", "attack", "return and step")) > 0
        assert row["errors"]["training"] < 1e-5 and 0 < row["errors"]["precision"] < 0.01
        assert f"{row['images_per_second']:.1f}" in printed
        assert (row["loop"] == "fast") <= (row["fast_is_faster"] == 1)


def test_red_parity_prints_no_speed(tmp_path, capsys, monkeypatch):
    real = training_loops.build_optimizer

    def climbs_too_far(config, model):
        return real(replace(config, rho=1.1 * config.rho) if config.rho else config, model)

    monkeypatch.setattr(training_loops, "build_optimizer", climbs_too_far)
    rows = tmp_path / "rows.jsonl"
    assert main(["throughput", *TINY, "--methods", "sgd", "sam", "--rows", str(rows)]) == 1
    printed = capsys.readouterr().out
    assert "parity is red: sam's training" in printed and "red: sgd" not in printed
    assert "images/s" not in printed and not rows.exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--methods", "adam"], "adam"),
        (["--methods", "sgd", "sam-micro"], "no plain recipe of 'sam-micro'"),
        (["--beside", "graph"], "CUDA"),
        (["--beside", "nothing"], "nothing"),
        (["--turns", "0"], "turns"),
        (["--images", "-1"], "images"),
        (["--images", "7"], "batch"),
        (["--workers", "-1"], "workers"),
        (["--padding", "mirror"], "mirror"),
        (["--cutout", "-3"], "-3"),
        (["--image-size", "4"], "pad 4"),
        (["--device", "abacus"], "abacus"),
        (["--amp", "fp8"], "fp8"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence(arguments, said, tmp_path, capsys):
    command = ["throughput", *TINY, *arguments, "--rows", str(tmp_path / "rows.jsonl")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []


def test_compiled_loop_trains_the_same_network():
    from bench.speed.baselines import why_not_compile

    if obstacle := why_not_compile(torch.device("cpu")):
        pytest.skip(f"torch.compile does not work here: {obstacle}")
    options = replace(OPTIONS, compile=True)
    errors = training_loops.disagreement(tiny_config("at-linf", amp="off"), options)
    for part, allowed in training_loops.TOLERANCE.items():
        assert errors[part] <= allowed / 10, part


def test_a_gpu_needs_no_number(monkeypatch):
    """torch.cuda.set_device("cuda") is an error."""
    def reached(*args):
        raise InterruptedError

    monkeypatch.setattr(throughput, "usable_device", torch.device)
    monkeypatch.setattr(throughput, "disagreement", reached)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    config = replace(tiny_config("sgd"), device="cuda")
    with pytest.raises(InterruptedError):
        throughput.throughput([config], training_loops.Options(images=config.batch_size))
