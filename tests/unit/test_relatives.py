"""Momentum-SAM, GSAM and LookSAM: against their authors' code, across backends, and what is theirs
alone. What they share with SAM is in the tests of the contract (`variants.RELATIVES`)."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fastsam import GSAM, SAM, LookSAM, MomentumSAM, PhaseError
from fastsam.choose import BACKENDS

from ..helpers import published
from ..helpers.contract import assert_bits, backward, bits, network
from ..helpers.drawn import assert_close, give, normals
from ..helpers.variants import RELATIVES

SHAPES = [(7,), (4, 3), (1,), (2, 3, 2, 2), (33, 40), ()]
F64 = torch.float64
HYPER = dict(lr=0.07, momentum=0.8, weight_decay=0.02)
ADAM = dict(lr=0.02, betas=(0.8, 0.97), eps=1e-3)
EXACT = ["reference", "numba"]  # take float64


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames and "every_backend" not in metafunc.function.__name__:
        metafunc.parametrize("backend", BACKENDS)


def parameters(seed: int = 0, dtype=torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in normals(SHAPES, seed, dtype)]


# ---- the authors' code, on the same gradients, in float64


@pytest.mark.parametrize("exact", EXACT)
def test_momentum_sam_over_sgd_is_the_authors(exact):
    """Their weight decay is of w', the base's of w: ours gets the difference in its gradients."""
    w = parameters()
    theirs = published.MomentumSAM(published.SGD(w, **HYPER), rho=0.4)
    opt = MomentumSAM(w, torch.optim.SGD, rho=0.4, backend=exact, **HYPER)
    for t in range(12):
        start = [p.detach().clone() for p in w]
        opt.first_step()
        assert_close(w, theirs.moved, f"moved at {t}: ")
        grads = normals(SHAPES, 10 + t, F64)
        give(w, [g + HYPER["weight_decay"] * (moved.detach() - p)
                 for g, moved, p in zip(grads, w, start, strict=True)])
        opt.second_step(zero_grad=True)
        theirs.step(grads)
        assert_close(w, theirs.base.w, f"after step {t}: ")


@pytest.mark.parametrize("exact", EXACT)
def test_momentum_sam_over_adamw_is_the_authors(exact):
    w = parameters()
    theirs = published.MomentumSAM(published.AdamW(w, **ADAM), rho=0.4)
    opt = MomentumSAM(w, torch.optim.AdamW, rho=0.4, backend=exact, weight_decay=0.0, **ADAM)
    for t in range(12):
        opt.first_step()
        assert_close(w, theirs.moved, f"moved at {t}: ")
        give(w, normals(SHAPES, 10 + t, F64))
        opt.second_step(zero_grad=True)
        theirs.step(normals(SHAPES, 10 + t, F64))
        assert_close(w, theirs.base.w, f"after step {t}: ")


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_gsam_is_the_authors(exact, base):
    w = parameters()
    sgd = base == "sgd"
    kind, hyper = (torch.optim.SGD, HYPER) if sgd else (torch.optim.AdamW, ADAM)
    theirs = published.GSAM((published.SGD if sgd else published.AdamW)(w, **hyper), 0.3, 0.7)
    opt = GSAM(w, kind, rho=0.3, alpha=0.7, backend=exact, **{"weight_decay": 0.0, **hyper})
    for t in range(10):
        first, second = (normals(SHAPES, seed + t, F64) for seed in (10, 50))
        give(w, first)
        opt.first_step(zero_grad=True)
        assert_close(w, theirs.climbed(first), f"moved at {t}: ")
        give(w, second)
        opt.second_step(zero_grad=True)
        theirs.step(first, second)
        assert_close(w, theirs.base.w, f"after step {t}: ")


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_looksam_is_the_authors(exact, base):
    w = parameters()
    sgd = base == "sgd"
    kind, hyper = (torch.optim.SGD, HYPER) if sgd else (torch.optim.AdamW, ADAM)
    theirs = published.LookSAM((published.SGD if sgd else published.AdamW)(w, **hyper), 0.3, 0.7)
    opt = LookSAM(w, kind, rho=0.3, alpha=0.7, k=4, backend=exact, **{"weight_decay": 0.0, **hyper})
    for t in range(11):
        first, second = (normals(SHAPES, seed + t, F64) for seed in (10, 50))
        assert opt.climbs_next == (t % 4 == 0)
        give(w, first)
        if opt.climbs_next:
            opt.first_step(zero_grad=True)
            assert_close(w, theirs.climbed(first), f"moved at {t}: ")
            give(w, second)
            opt.second_step(zero_grad=True)
            theirs.sam_step(first, second)
        else:
            opt.step()
            theirs.step_between(first)
        assert_close(w, theirs.base.w, f"after step {t}: ")


# ---- groups that differ, by hand


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("name", ["msam", "gsam", "looksam"])
def test_groups_climb_by_their_own_rho_and_mix_by_their_own_alpha(name, exact):
    """Norms and inner products are over both that climb; the third steps as by the base."""
    rhos, alphas, lrs, decays = [0.3, 0.7], [0.4, -0.2, 9.0], [0.1, 0.05, 0.2], [0.02, 0.0, 0.1]
    w = parameters()
    parts = [w[:2], w[2:4], w[4:]]
    groups = [dict(params=ps, lr=lr, weight_decay=decay, rho=rho, perturb=i < 2)
              | ({} if name == "msam" else dict(alpha=alpha))
              for i, (ps, lr, decay, rho, alpha) in enumerate(
                  zip(parts, lrs, decays, [*rhos, 5.0], alphas, strict=True))]
    cls = {"msam": MomentumSAM, "gsam": GSAM, "looksam": LookSAM}[name]
    own = dict(k=3) if name == "looksam" else {}
    opt = cls(groups, torch.optim.SGD, momentum=0.8, lr=1.0, backend=exact, **own)
    of = [0, 0, 1, 1, 2, 2]  # each parameter's group
    x, v = [p.detach().clone() for p in w], [torch.zeros_like(p) for p in w]
    g_v = v
    for t in range(7):
        first, second = (normals(SHAPES, seed + t, F64) for seed in (10, 50))
        d = [-u for u in v] if name == "msam" else first
        climbs = opt.climbs_next
        if name != "msam":
            give(w, first)
        if climbs:
            opt.first_step(zero_grad=True)
            norm = published.length(d[:4]) + published.TINY
            assert_close(w, [y + [*rhos, 0][i] * a / norm
                             for y, i, a in zip(x, of, d, strict=True)], f"moved at {t}: ")
            give(w, second)
        g = second if climbs else first
        add = [torch.zeros_like(y) for y in x]
        if name == "gsam":
            c = published.product(first[:4], second[:4]) / published.length(second[:4]) ** 2
            add = [c * b - a for a, b in zip(first, second, strict=True)]
        elif name == "looksam" and climbs:
            c = published.product(first[:4], second[:4]) / published.length(first[:4]) ** 2
            g_v = [b - c * a for a, b in zip(first, second, strict=True)]
        elif name == "looksam":
            c = published.length(first[:4]) / published.length(g_v[:4])
            add = [c * u for u in g_v]
        for i, j in enumerate(of):
            mixed = g[i] + (alphas[j] * add[i] if j < 2 else 0) + decays[j] * x[i]
            v[i] = 0.8 * v[i] + mixed
            x[i] = x[i] - lrs[j] * v[i]
        opt.step()
        opt.zero_grad()
        assert_close(w, x, f"after step {t}: ")


# ---- every backend and dtype, one step from the same state


TRIALS = {"msam": dict(rho=0.3), "gsam": dict(rho=0.3, alpha=0.7),
          "gsam-adaptive": dict(rho=0.9, alpha=-0.3, adaptive=True),
          "looksam": dict(rho=0.3, alpha=0.7, k=3)}
BASES = {"sgd": (torch.optim.SGD, dict(lr=0.07, momentum=0.8, weight_decay=0.02, nesterov=True)),
         "adam": (torch.optim.Adam, dict(**ADAM, weight_decay=0.1))}
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


class Trial:
    """One optimizer of three groups, one of which does not climb."""

    def __init__(self, name: str, base: str, backend: str, dtype, masters: bool = False):
        cls, own = RELATIVES[name.removesuffix("-adaptive")].cls, TRIALS[name]
        kind, hyper = BASES[base]
        self.w = parameters(0, dtype)
        groups = [dict(params=self.w[:2]), dict(params=self.w[2:5], rho=0.2),
                  dict(params=self.w[5:], perturb=False)]
        if name != "msam":
            groups[1]["alpha"] = 0.2
        self.opt = cls(groups, kind, backend=backend, master_weights=masters, **own, **hyper)

    def follow(self, other: "Trial") -> None:
        state = other.opt.state_dict()
        with torch.no_grad():
            for p, q in zip(self.w, other.w, strict=True):
                p.copy_(other.opt.state[q].get("master", q))
        self.opt.load_state_dict({**state, "state": {
            i: {k: x for k, x in entry.items() if k != "master"}
            for i, entry in copy.deepcopy(state["state"]).items()}})

    def step(self, first, second) -> None:
        climbs = self.opt.climbs_next
        give(self.w, first)
        if climbs:
            self.opt.first_step(zero_grad=True)
            give(self.w, second)
        self.opt.step()
        self.opt.zero_grad()

    def found(self) -> dict[str, torch.Tensor]:
        entries = self.opt.state_dict()["state"]
        return {f"w{i}": self.opt.state[p].get("master", p.detach()).double()
                for i, p in enumerate(self.w)} | {
            f"{name}{i}": x.double() for i, entry in entries.items()
            for name, x in entry.items() if name != "master"}


@pytest.mark.filterwarnings("ignore:the weights are 16-bit")
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("dtype, masters", [(FP32, False), (BF16, True)], ids=str)
@pytest.mark.parametrize("name, base", [
    ("msam", "sgd"), ("gsam", "sgd"), ("gsam-adaptive", "adam"), ("looksam", "sgd"),
    ("looksam", "adam")])
def test_every_backend_errs_at_most_twice_as_much_as_plain_torch(name, base, dtype, masters,
                                                                 backend):
    ours, plain = (Trial(name, base, b, dtype, masters) for b in (backend, "reference"))
    truth = Trial(name, base, "reference", FP64)
    for t in range(5):
        if t:
            plain.opt.load_state_dict(copy.deepcopy(ours.opt.state_dict()))
            with torch.no_grad():
                for p, q in zip(plain.w, ours.w, strict=True):
                    p.copy_(q)
            truth.follow(ours)
        else:
            truth.follow(plain)
        grads = [[g.to(dtype) for g in normals(SHAPES, seed + t, F64)] for seed in (10, 50)]
        for trial in (ours, plain, truth):
            trial.step(*grads)
        for (what, x), y, z in zip(ours.found().items(), plain.found().values(),
                                   truth.found().values(), strict=True):
            allowed = 2 * float((y - z).abs().max()) + 4 * torch.finfo(FP32).eps * max(
                1.0, float(z.abs().max()))
            assert float((x - z).abs().max()) <= allowed, f"{what} after step {t}"


# ---- Momentum-SAM


def test_momentum_sam_calls_the_closure_once_at_the_moved_weights(backend, device):
    net = network(device)
    opt = MomentumSAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.05, momentum=0.9,
                      backend=backend)
    seen = []

    def closure():
        seen.append((opt.is_perturbed, bits(net)))
        return backward(net, len(seen), device)

    opt.step(closure)
    w = bits(net)
    v = [opt.state[p]["momentum_buffer"].clone() for p in net.parameters()]
    assert len(seen) == 1 and opt.step(closure) > 0 and len(seen) == 2
    assert not opt.is_perturbed and seen[1][0]
    norm = math.sqrt(sum(float((x * x).sum()) for x in v))
    for p, q, x in zip(seen[1][1], w, v, strict=True):
        torch.testing.assert_close(p, q - 0.3 * x / norm)
    assert opt.last_radius == pytest.approx(0.3, rel=1e-4)


def test_the_first_step_of_momentum_sam_moves_nothing(backend, device):
    net = network(device)
    opt = MomentumSAM(net.parameters(), torch.optim.AdamW, rho=0.3, lr=0.05, backend=backend)
    w = bits(net)
    opt.first_step()
    assert_bits(net, w)
    assert opt.is_perturbed


def test_an_exception_in_momentum_sam_s_pass_restores(backend, device):
    net = network(device)
    opt = MomentumSAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.05, momentum=0.9,
                      backend=backend)
    opt.step(lambda: backward(net, 0, device))
    w = bits(net)

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert not opt.is_perturbed
    assert_bits(net, w)


@pytest.mark.parametrize("told", [True, False])
def test_momentum_sam_with_a_grad_scaler(backend, device, told):
    net, twin = network(device), network(device)
    opt, plain = (MomentumSAM(n.parameters(), torch.optim.SGD, rho=0.2, lr=0.05, momentum=0.9,
                              backend=backend) for n in (net, twin))
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for i in range(3):
        opt.first_step(scaler=scaler if told else None)
        if told:
            with pytest.raises(PhaseError, match="scaler.step"):
                opt.second_step()
        scaler.scale(torch.ones((), device=device))
        for n, o in ((net, opt), (twin, plain)):
            if n is twin:
                o.first_step()
            loss_scale = 1024.0 if n is net else 1.0
            backward(n, i, device)
            with torch.no_grad():
                for p in n.parameters():
                    p.grad.mul_(loss_scale)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        plain.second_step(zero_grad=True)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    net.head.bias.grad = torch.full_like(net.head.bias, torch.inf)
    w = bits(net)
    opt.first_step()
    scaler.step(opt)
    scaler.update()
    assert_bits(net, w)
    assert opt.skipped_steps == 1 and scaler.get_scale() == 512.0


def test_a_momentum_that_others_change_is_the_one_climbed_along(backend):
    w = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    opt = MomentumSAM(w, torch.optim.SGD, rho=1.0, lr=0.0, momentum=0.5, backend=backend)
    for p in w:
        p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    opt.state[w[0]]["momentum_buffer"].mul_(0)
    opt.state[w[1]]["momentum_buffer"] = torch.tensor([3.0, -4.0])
    opt.first_step()
    torch.testing.assert_close(w[0].detach(), torch.zeros(3))
    torch.testing.assert_close(w[1].detach(), torch.tensor([-0.6, 0.8]))
    opt.restore()
    opt.param_groups[0]["rho"] = 5.0
    opt.first_step()
    torch.testing.assert_close(w[1].detach(), torch.tensor([-3.0, 4.0]))


def test_a_frozen_parameter_does_not_climb_along_its_old_momentum(backend, device):
    net = network(device)
    opt = MomentumSAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.05, momentum=0.9,
                      backend=backend)
    opt.step(lambda: backward(net, 0, device))
    opt.zero_grad()
    net.conv.weight.requires_grad_(False)
    w = bits(net)
    rest = [opt.state[p]["momentum_buffer"] for p in net.parameters() if p.requires_grad]
    norm = math.sqrt(sum(float((v * v).sum()) for v in rest))
    opt.first_step()
    assert torch.equal(net.conv.weight, w[0]) and opt.last_radius == pytest.approx(0.3, rel=1e-4)
    torch.testing.assert_close(
        net.head.bias.detach(), w[-1] - 0.3 * opt.state[net.head.bias]["momentum_buffer"] / norm)
    opt.restore()
    net.conv.weight.requires_grad_(True)
    opt.first_step()
    assert not torch.equal(net.conv.weight, w[0])


def test_momentum_sam_refuses_what_it_cannot_climb_along():
    w = parameters()
    with pytest.raises(ValueError, match="momentum=0 leaves nothing"):
        MomentumSAM(w, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="RMSprop"):
        MomentumSAM(w, torch.optim.RMSprop, lr=0.1)
    with pytest.raises(TypeError, match="adaptive"):
        MomentumSAM(w, torch.optim.SGD, lr=0.1, momentum=0.9, adaptive=True)
    opt = MomentumSAM([dict(params=w[:3]), dict(params=w[3:], perturb=False, momentum=0.0)],
                      torch.optim.SGD, lr=0.1, momentum=0.9)
    opt.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="momentum=0 leaves nothing"):
        opt.first_step()
    opt.param_groups[0]["momentum"] = 0.9
    with pytest.raises(TypeError, match="ascent_closure"):
        opt.step(lambda: None, ascent_closure=lambda: None)
    with pytest.raises(PhaseError, match="no first pass"):
        opt.local_first_pass(nn.Linear(1, 1))
    state = opt.state_dict()
    state["param_groups"][0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="momentum=0 leaves nothing"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["momentum"] == 0.9


# ---- GSAM and LookSAM


@pytest.mark.parametrize("cls", [GSAM, LookSAM])
def test_alpha_0_is_sam(cls, backend, device):
    net, twin = network(device), network(device)
    opt = cls(net.parameters(), torch.optim.SGD, rho=0.2, alpha=0.0, lr=0.05, momentum=0.9,
              backend=backend)
    sam = SAM(twin.parameters(), torch.optim.SGD, rho=0.2, lr=0.05, momentum=0.9, backend=backend,
              interval=5 if cls is LookSAM else 1)
    for i in range(7):
        opt.step(lambda i=i: backward(net, i, device))
        sam.step(lambda i=i: backward(twin, i, device))
    assert_bits(net, bits(twin))


def test_looksam_calls_the_closure_twice_at_every_kth_step(backend, device):
    net, calls = network(device), []
    opt = LookSAM(net.parameters(), torch.optim.SGD, k=3, lr=0.05, momentum=0.9, backend=backend)

    def closure():
        calls[-1] += 1
        return backward(net, 0, device)

    for _ in range(7):
        calls.append(0)
        opt.step(closure)
    assert calls == [2, 1, 1, 2, 1, 1, 2]


@pytest.mark.parametrize("way", ["load", "pickle"])
def test_looksam_goes_on_between_its_climbs_where_it_was(way, backend, device):
    net = network(device)
    make = lambda n: LookSAM(n.parameters(), torch.optim.SGD, rho=0.2, k=4, lr=0.05,  # noqa: E731
                             momentum=0.9, backend=backend)
    opt = make(net)
    for i in range(6):
        opt.step(lambda i=i: backward(net, i, device))
    if way == "load":
        twin = copy.deepcopy(net)
        other = make(twin)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        twin, other = pickle.loads(pickle.dumps((net, opt)))
    for i in range(6, 11):
        opt.step(lambda i=i: backward(net, i, device))
        other.step(lambda i=i: backward(twin, i, device))
        assert_bits(net, bits(twin))


def test_a_climb_that_is_given_up_leaves_looksam_s_g_v(backend, device):
    net = network(device)
    opt = LookSAM(net.parameters(), torch.optim.SGD, rho=0.2, k=1, lr=0.05, momentum=0.9,
                  backend=backend)
    opt.step(lambda: backward(net, 0, device))
    g_v = [opt.state[p]["g_v"].clone() for p in net.parameters()]
    assert all(x.abs().sum() > 0 for x in g_v[1:])
    backward(net, 1, device)
    opt.first_step()
    opt.restore()
    backward(net, 2, device)
    net.head.bias.grad[0] = torch.nan
    opt.first_step(zero_grad=True)
    backward(net, 2, device)
    opt.second_step(zero_grad=True)
    assert opt.skipped_steps == 1
    for p, x in zip(net.parameters(), g_v, strict=True):
        assert torch.equal(opt.state[p]["g_v"], x)


@pytest.mark.parametrize("climbs", [True, False])
@pytest.mark.parametrize("cls", [GSAM, LookSAM])
def test_a_bad_gradient_does_not_spread_to_all_weights(cls, climbs, backend, device):
    net = network(device)
    opt = cls(net.parameters(), torch.optim.SGD, rho=0.2, lr=0.05, momentum=0.9, backend=backend)
    opt.step(lambda: backward(net, 0, device))
    if climbs:
        opt.param_groups[0]["sam_steps"] = 0
        backward(net, 1, device)
        opt.first_step(zero_grad=True)
    elif cls is GSAM:
        return  # a plain step of the base
    backward(net, 1, device)
    net.head.bias.grad[1] = torch.inf
    opt.restore() if not climbs else None
    before = copy.deepcopy(opt.state[net.head.bias]["momentum_buffer"])
    opt.step()
    opt.zero_grad()
    assert opt.skipped_steps == 1
    assert torch.equal(before, opt.state[net.head.bias]["momentum_buffer"])
    assert all(p.isfinite().all() for p in net.parameters())
    opt.step(lambda: backward(net, 2, device))
    assert opt.skipped_steps == 1


def test_a_gradient_of_one_pass_only_is_not_mixed(backend):
    """The second parameter has no first gradient: as by SGD, and not in the inner product."""
    w = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([5.0]))]
    opt = GSAM(w, torch.optim.SGD, rho=0.1, alpha=0.5, lr=1.0, backend=backend)
    w[0].grad = torch.tensor([3.0, 0.0])
    opt.first_step(zero_grad=True)
    w[0].grad, w[1].grad = torch.tensor([1.0, 1.0]), torch.tensor([100.0])
    opt.second_step(zero_grad=True)
    # h = (3, 0) - 3/2 (1, 1) = (1.5, -1.5)
    torch.testing.assert_close(w[0].detach(), torch.tensor([1.0 - 0.25, 2.0 - 1.75]))
    torch.testing.assert_close(w[1].detach(), torch.tensor([-95.0]))


@pytest.mark.parametrize("share", [1.1, -0.3])
def test_looksam_adds_nothing_where_both_gradients_are_parallel(share, backend):
    """g' - <g', g> / ||g||^2 g is what rounding leaves of 0 then, in no direction."""
    params, twins = parameters(0, torch.float32), parameters(0, torch.float32)
    opt = LookSAM(params, torch.optim.SGD, rho=0.1, k=3, backend=backend, **HYPER)
    sam = SAM(twins, torch.optim.SGD, rho=0.1, interval=3, backend=backend, **HYPER)
    for t in range(5):
        for ps, o in ((params, opt), (twins, sam)):
            grads = normals(SHAPES, 10 + t, torch.float32)
            give(ps, grads)
            if o.climbs_next:
                o.first_step(zero_grad=True)
                give(ps, [share * g for g in grads])
            o.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)


def test_looksam_uses_a_g_v_that_is_small_but_no_noise(backend):
    params = parameters(0, torch.float32)
    opt = LookSAM(params, torch.optim.SGD, rho=0.1, alpha=1.0, k=2, lr=1.0, backend=backend)
    g, other = normals(SHAPES, 1, torch.float32), normals(SHAPES, 2, torch.float32)
    give(params, g)
    opt.first_step(zero_grad=True)
    give(params, [x + 1e-3 * y for x, y in zip(g, other, strict=True)])
    opt.step()
    w = [p.detach().clone() for p in params]
    give(params, g)
    opt.step()
    added = torch.cat([(x - p.detach() - y).flatten()
                       for x, p, y in zip(w, params, g, strict=True)])
    assert float(added.norm()) == pytest.approx(float(published.length(g)), rel=1e-3)


@pytest.mark.parametrize("cls, way", [
    (SAM, "climb"), (SAM, "stash"), (GSAM, "climb"), (LookSAM, "climb"), (LookSAM, "plain")])
def test_a_scaled_step_without_a_second_gradient_is_quiet(cls, way):
    """GradScaler's flag is the sum over no gradients then, the number 0."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = cls([p], torch.optim.SGD, rho=0.1, lr=0.1, backend="reference")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = scaler.scale((p * p).sum())
    if way != "plain":
        loss.backward()
        opt.first_step(zero_grad=True, scaler=scaler)
    if way == "stash":
        opt.stash_grad()
    scaler.step(opt)
    assert p.tolist() == [1.0, 2.0] and not opt.is_perturbed and opt.skipped_steps == 0


def test_gsam_does_not_mix_a_scaled_gradient_with_one_that_is_not():
    p, q = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    opt, twin = (GSAM([x], torch.optim.SGD, rho=0.1, lr=0.1, backend="reference") for x in (p, q))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def backward(x, scale=scaler.scale):
        x.grad = None
        scale((x * x * x).sum()).backward()

    backward(p)
    opt.first_step(zero_grad=True)
    backward(p)
    with pytest.raises(PhaseError, match=r"first_step\(scaler=scaler\)"):
        scaler.step(opt)
    assert torch.equal(p, q) and not opt.is_perturbed
    scaler.update()
    backward(p)
    opt.first_step(zero_grad=True, scaler=scaler)
    backward(p)
    scaler.step(opt)
    for half in twin.first_step, twin.second_step:
        backward(q, lambda loss: loss)
        half()
    assert torch.equal(p, q)


@pytest.mark.parametrize("cls", [GSAM, LookSAM])
def test_what_gsam_and_looksam_refuse(cls):
    w = parameters()
    with pytest.raises(ValueError, match="RMSprop"):
        cls(w, torch.optim.RMSprop, lr=0.1)
    with pytest.raises(ValueError, match="alpha=nan"):
        cls(w, torch.optim.SGD, lr=0.1, alpha=math.nan)
    with pytest.raises(ValueError, match="alpha is a tensor"):
        cls(w, torch.optim.SGD, lr=0.1, alpha=torch.tensor(0.1))
    opt = cls(w, torch.optim.SGD, lr=0.1)
    with pytest.raises(PhaseError, match="whole batch"):
        opt.stash_grad()
    with pytest.raises(PhaseError, match="whole batch"):
        opt.local_first_pass(nn.Linear(1, 1))


def test_looksam_refuses_a_k_and_what_it_has_not():
    w = parameters()
    for k in (0, 2.5):
        with pytest.raises(ValueError, match=f"^k={k} is out of range"):
            LookSAM(w, torch.optim.SGD, lr=0.1, k=k)
    with pytest.raises(TypeError, match="use k="):
        LookSAM(w, torch.optim.SGD, lr=0.1, interval=3)
    with pytest.raises(TypeError, match="adaptive"):
        LookSAM(w, torch.optim.SGD, lr=0.1, adaptive=True)
