"""How long things take beside their peers: `make bench`, which keeps the first call's times and
holds later ones against them. `make test` runs each once, untimed."""

from functools import cache

import pytest
import torch
from torch import nn

from bench.attacks.pgd import Attack, can_fuse, fused_climb, plain_climb
from bench.models import build_model
from bench.speed.bandwidth import wait
from bench.speed.contenders import Contender, contenders
from bench.speed.parity import TOLERANCE, parity_error
from bench.speed.step import BASE_HYPER, PERTURBATION, StepConfig, workload
from bench.speed.timing import Runner, random_like
from fastsam import SAM, FriendlySAM, freeze_bn_stats

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HYPER = PERTURBATION | BASE_HYPER["sgd"]
# by number of parameters, then of tensors
SIZES = [(100_000, 62), (1_000_000, 62), (10_000_000, 62), (1_000_000, 1), (1_000_000, 1000)]
EPS, ALPHA = 8 / 255, 2 / 255


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share their processors with another program wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shapes_of(parameters: int, tensors: int) -> list[torch.Size]:
    return workload(StepConfig(params=parameters, tensors=tensors))[1]


# ---- the optimizer's step


@cache
def contender(method: str, who: str, parameters: int) -> Contender:
    """torch, a per-parameter peer, or fastsam with the backend it chooses for so many parameters;
    checked for parity."""
    if who == "fastsam":
        p = nn.Parameter(torch.zeros(parameters, device=DEVICE))
        who = f"fastsam {SAM([p], torch.optim.SGD, lr=0.1).backend_report()['backend']}"
    found, _ = contenders((method,), "sgd", torch.float32, DEVICE)
    (one,) = (c for c in found if c.name == who)
    error = parity_error(one, "sgd", torch.float32, DEVICE)
    assert error <= TOLERANCE[torch.float32], f"{method} by {who} is off by {error}: no speed"
    return one


@pytest.mark.parametrize("parameters, tensors", SIZES)
@pytest.mark.parametrize("method, who", [
    ("sgd", "torch"), ("sam", "per-parameter"), ("sam", "fastsam"),
    ("fsam", "per-parameter"), ("fsam", "fastsam")])
def test_optimizer_step(method, who, parameters, tensors, benchmark):
    benchmark.group = f"optimizer step, {parameters:,} parameters in {tensors} tensors"
    shapes = shapes_of(parameters, tensors)
    w, g1, g2 = (random_like(shapes, torch.float32, DEVICE, seed, 0.1) for seed in range(3))
    runner = Runner(contender(method, who, parameters), w, (g1, g2), HYPER)

    def step() -> None:
        for gradients, phase in runner.phases:
            runner.point_at(gradients)
            phase()
        wait(DEVICE)

    benchmark(step)
    assert all(p.isfinite().all() and not torch.equal(p, old)
               for p, old in zip(runner.params, w, strict=True))


# ---- PGD's step


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("climb", [plain_climb, fused_climb])
def test_pgd_step(climb, norm, benchmark):
    benchmark.group = f"PGD step, {norm}, 128 images of 32x32"
    x = torch.rand(128, 3, 32, 32, device=DEVICE)
    if climb is fused_climb and not can_fuse(x):
        pytest.skip("the fused PGD step needs a GPU")
    g, attack = torch.randn_like(x), Attack(norm, EPS, ALPHA, 1)

    def step() -> torch.Tensor:
        x_adv = climb(x.clone(), g, x, attack)
        wait(DEVICE)
        return x_adv

    x_adv = benchmark(step)
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= ALPHA * (1 + 1e-4)).all() and (size > ALPHA / 2).all()
    assert 0 <= x_adv.min() and x_adv.max() <= 1


# ---- around the second pass


@pytest.mark.parametrize("layers", [20, 200])
def test_batchnorm_freezing(layers, benchmark):
    benchmark.group = "freezing BatchNorm's statistics, around nothing"
    if layers == 20:
        model = build_model("preactresnet18", 4, 3, 10, [0.5] * 3, [0.2] * 3)
    else:
        model = nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(layers)))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    seen = []

    def freeze() -> None:
        with freeze_bn_stats(model):
            seen.append(norms[-1].track_running_stats)

    benchmark(freeze)
    assert len(norms) >= 17 and not any(seen) and all(m.track_running_stats for m in norms)


# ---- checkpoints


@pytest.mark.parametrize("tensors", [62, 1000])
@pytest.mark.parametrize("cls", [torch.optim.SGD, FriendlySAM])
@pytest.mark.parametrize("way", ["save", "load"])
def test_state_dict(way, cls, tensors, benchmark):
    benchmark.group = f"state_dict, {way}, {tensors} tensors"
    params = [nn.Parameter(w) for w in random_like(shapes_of(100_000, tensors), torch.float32,
                                                   DEVICE, seed=0)]
    base = {"base_optimizer": torch.optim.SGD} if cls is FriendlySAM else {}
    opt = cls(params, **base, **BASE_HYPER["sgd"])
    for p, g in zip(params, random_like([p.shape for p in params], torch.float32, DEVICE, seed=1),
                    strict=True):
        p.grad = g
    opt.step()
    saved = opt.state_dict()
    kept = {i: s["momentum_buffer"].clone() for i, s in saved["state"].items()}
    if way == "save":
        saved = benchmark(opt.state_dict)
    else:
        benchmark(opt.load_state_dict, saved)
        saved = opt.state_dict()
    assert len(kept) == tensors
    assert all(torch.equal(saved["state"][i]["momentum_buffer"], v) for i, v in kept.items())
