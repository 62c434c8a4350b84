"""A group's values at any time: followed as torch follows them, or refused by name before a weight
changes."""

import math
from collections import UserList
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from fastsam import ASAM, SAM, FisherSAM, FriendlySAM

from ..helpers.beside import RHO, Beside, close
from ..helpers.lockstep import build


def setting(**values):
    def edit(opt, params):
        opt.param_groups[0].update(values)
    return edit


# ---- followed, as torch's SGD and AdamW do


SGDS = {
    "lr": dict(lr=0.3), "no lr": dict(lr=0.0), "integer": dict(lr=1, weight_decay=0),
    "numpy": dict(lr=np.float32(0.25), momentum=np.float64(0.5)),
    "fraction": dict(lr=Fraction(1, 4)), "descending": dict(lr=-0.1),
    "tensor": dict(lr=torch.tensor(0.3)), "one element": dict(lr=torch.tensor([0.3])),
    "1 x 1": dict(lr=torch.tensor([[0.3]])),
    "float64 tensor": dict(lr=torch.tensor(0.3, dtype=torch.float64)),
    "float16 tensor": dict(lr=torch.tensor([0.25], dtype=torch.float16)),
    "integer tensor": dict(lr=torch.tensor(1)),
    "with a graph": dict(lr=torch.tensor(0.3, requires_grad=True)),
    "weight decay": dict(weight_decay=0.5), "no momentum": dict(momentum=0.0),
    "more momentum": dict(momentum=0.99, dampening=0.5),
    "nesterov": dict(nesterov=True, dampening=0.0), "nesterov is None": dict(nesterov=None),
}
ADAMS = {
    "betas": dict(betas=(0.5, 0.6)), "a list": dict(betas=[0.5, 0.6]), "zeros": dict(betas=(0, 0)),
    "numpy": dict(betas=(np.float32(0.5), np.float64(0.75))),
    "an array": dict(betas=np.array([0.5, 0.75])),
    "somebody's list": dict(betas=UserList([0.5, 0.75])),  # as omegaconf's, and so Hydra's
    "eps": dict(eps=0.1),
    "tensor": dict(lr=torch.tensor(0.1)), "weight decay": dict(weight_decay=0.5),
}


@pytest.mark.parametrize("name", SGDS)
def test_values_are_followed_as_sgd_follows_them(name, backend):
    pair = Beside("sgd", backend)
    pair.step(2)
    setting(**SGDS[name])(pair.ours.opt, pair.ours.params)
    plain = {k: x.item() if isinstance(x, torch.Tensor) else x for k, x in SGDS[name].items()}
    setting(**{k: float(x) if isinstance(x, Fraction) else x for k, x in plain.items()})(
        pair.torch.opt, pair.torch.params)
    pair.step(2)


@pytest.mark.parametrize("name", ADAMS)
def test_values_are_followed_as_adamw_follows_them(name, backend):
    pair = Beside("adamw", backend)
    pair.step(2)
    pair.both(setting(**ADAMS[name]))
    pair.step(2)


def test_betas_of_a_list_may_change_in_place(backend):
    pair = Beside("adamw", backend)
    pair.both(lambda opt, params: opt.param_groups[0].update(betas=[0.9, 0.99]))
    pair.step()

    def change(opt, params):
        opt.param_groups[0]["betas"][0] = 0.3

    pair.both(change)
    pair.step(2)


def test_a_tensor_that_changes_in_place_is_followed(backend):
    pair = Beside("sgd", backend)
    lr = torch.tensor([0.1])
    pair.ours.opt.param_groups[0]["lr"] = lr
    for value in (0.1, 0.3, 0.02):
        lr.fill_(value)
        pair.torch.opt.param_groups[0]["lr"] = value
        pair.step()


@pytest.mark.parametrize("how", ["data", "set_", "of float64"])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_tensor_that_is_given_other_memory_is_followed(name, how, backend):
    pair = Beside("sgd", backend)
    x = torch.tensor(0.1)
    pair.ours.opt.param_groups[0][name] = x
    pair.torch.opt.param_groups[0][name] = 0.1
    for value in (0.1, 0.3, 0.02):
        new = torch.tensor(value, dtype=torch.float64 if how == "of float64" else None)
        if how == "set_":
            x.set_(new)
        else:
            x.data = new
        pair.torch.opt.param_groups[0][name] = value
        pair.climb()
        pair.descend()


def test_a_radius_that_is_given_other_memory_is_followed(backend):
    p = nn.Parameter(torch.ones(4))
    opt = SAM([p], torch.optim.SGD, rho=torch.tensor(0.5), lr=0.1, backend=backend)
    for rho in (0.5, 2.0, 0.25):
        opt.param_groups[0]["rho"].data = torch.tensor(rho)
        p.grad = torch.ones(4)
        opt.first_step()
        close(p, torch.full((4,), 1 + rho / 2), "moved")
        opt.restore()


@pytest.mark.parametrize("base", ["sgd", "plain sgd"])
def test_momentum_on_and_off_in_one_group_or_both(base, backend):
    pair = Beside(base, backend)
    pair.step()
    for first, second in ((0.9, 0.0), (0.9, 0.5), (0.0, 0.5), (0.0, 0.0), (0.7, 0.0), (0.9, 0.9)):
        def edit(opt, params, values=(first, second)):
            for group, value in zip(opt.param_groups, values, strict=True):
                group["momentum"] = value
        pair.both(edit)
        pair.step(2)


@pytest.mark.parametrize("values", [dict(lr=0.3), dict(momentum=0.5), dict(weight_decay=0.3),
                                    dict(lr=torch.tensor([0.2])), dict(rho=7.0),
                                    dict(perturb=False), dict(adaptive=True)], ids=repr)
@pytest.mark.parametrize("base", ["sgd", "plain sgd"])
def test_values_changed_while_perturbed_are_the_second_halfs(values, base, backend):
    pair = Beside(base, backend)
    pair.step()
    pair.climb()
    setting(**values)(pair.ours.opt, [])
    setting(**{k: float(x) for k, x in values.items() if k in pair.torch.opt.param_groups[0]})(
        pair.torch.opt, [])
    pair.descend()
    setting(rho=RHO, perturb=True, adaptive=False)(pair.ours.opt, [])
    pair.step()


@pytest.mark.parametrize("rho", [np.float32(0.5), np.int64(1), 1, torch.tensor(0.5),
                                 torch.tensor([0.5]), torch.tensor([[1]]), Fraction(1, 2)],
                         ids=repr)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_a_radius_may_be_any_real_number(rho, shape, backend):
    p = nn.Parameter(torch.ones(shape))
    opt = SAM([p], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
    opt.param_groups[0]["rho"] = rho
    p.grad = torch.ones(shape)
    opt.first_step()
    close(p, 1 + float(rho) * torch.ones(shape) / p.numel() ** 0.5, "moved")
    opt.restore()


# ---- refused


NAN, INF = math.nan, math.inf
RHOS = {
    "nan": NAN, "-1": -1, "-0.5": -0.5, "inf": INF, "-inf": -INF, "'0.05'": "0.05", "None": None,
    "1j": 1j, "[0.1]": [0.1], "array": np.array([0.1]), "float32(nan)": np.float32("nan"),
    "two": torch.ones(2), "empty": torch.ones(0), "complex tensor": torch.tensor(1j),
    "meta": torch.ones((), device="meta"),
}
BAD = [("sgd", "rho", x) for x in RHOS.values()] + [
    ("sgd", name, x) for name in ("lr", "weight_decay")
    for x in (None, "0.1", 1j, [0.1], torch.ones(2), torch.tensor(1j), np.array([0.1]))] + [
    ("sgd", name, x) for name in ("momentum", "dampening")
    for x in (None, "0.1", 1j, torch.tensor(0.9))] + [
    ("adamw", "betas", x) for x in (None, 0.9, (0.9,), (0.9, 0.9, 0.9), (1.0, 0.9), (0.9, 1.0),
                                    (-0.1, 0.9), ("a", "b"), (None, 0.9), (NAN, 0.9),
                                    torch.tensor([0.9, 0.99]), (torch.tensor(0.9), 0.99))] + [
    ("adamw", "eps", x) for x in (None, "1e-8", torch.tensor(1e-8))] + [
    ("adamw", "amsgrad", True), ("adamw", "maximize", True), ("sgd", "maximize", True),
    ("sgd", "differentiable", True), ("sgd", "adaptive", 2), ("sgd", "adaptive", None),
    ("sgd", "perturb", "no"), ("sgd", "perturb", None)]


def assert_refused(opt, params, name, calls):
    weights = [p.detach().clone() for p in params]
    was = opt.is_perturbed
    for call in calls:
        with pytest.raises(ValueError, match=name):
            call()
        assert opt.is_perturbed == was
        assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))


@pytest.mark.parametrize("base, name, value", BAD, ids=lambda x: str(x)[:20])
def test_values_that_are_refused_change_nothing(base, name, value):
    """At construction, in a group of its own, between steps and between the halves of one."""
    pair = Beside(base, "reference")
    pair.step()
    side = pair.ours
    group = side.opt.param_groups[1]
    was = group[name]
    group[name] = value
    pair.set(side, pair.gradients(3))
    assert_refused(side.opt, side.params, name, (side.opt.first_step, side.opt.step))
    group[name] = was
    with pytest.raises(ValueError, match=name):
        side.opt.add_param_group({"params": [side.params[4]], name: value})
    assert len(side.opt.param_groups) == 2
    pair.climb()
    group[name] = value
    pair.set(side, pair.gradients(3))
    assert_refused(side.opt, side.params, name, (side.opt.step,))
    pair.restored()
    group[name] = was
    pair.step()
    if name in ("rho", "adaptive", "perturb"):
        with pytest.raises(ValueError, match=name):
            SAM([{"params": [nn.Parameter(torch.ones(2))], name: value}], torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("name, value", [("rho", NAN), ("lr", None), ("momentum", "0.9"),
                                         ("weight_decay", torch.ones(2))], ids=str)
def test_every_backend_refuses_before_a_weight_changes(name, value, backend):
    pair = Beside("sgd", backend)
    pair.step()
    pair.ours.opt.param_groups[1][name] = value
    pair.set(pair.ours, pair.gradients(3))
    assert_refused(pair.ours.opt, pair.ours.params, name,
                   (pair.ours.opt.first_step, pair.ours.opt.step))


@pytest.mark.parametrize("make, name, value", [
    (FriendlySAM, "sigma", NAN), (FriendlySAM, "sigma", "1"), (FriendlySAM, "sigma", None),
    (FriendlySAM, "lmbda", 1.0), (FriendlySAM, "lmbda", -0.1), (FriendlySAM, "lmbda", NAN),
    (ASAM, "eta", -1.0), (ASAM, "eta", NAN), (ASAM, "eta", None), (ASAM, "scale", "some"),
    (ASAM, "scale", None), (FisherSAM, "eta", -1.0), (FisherSAM, "eta", torch.tensor(1.0)),
    (FisherSAM, "eta", "1")], ids=str)
def test_the_variants_own_values_are_refused_at_any_time(make, name, value):
    p = nn.Parameter(torch.ones(3))
    opt = make([p], torch.optim.SGD, lr=0.1)
    p.grad = torch.ones(3)
    opt.first_step()
    opt.second_step()
    opt.param_groups[0][name] = value
    assert_refused(opt, [p], name, (opt.first_step, opt.step))


@pytest.mark.parametrize("key", ["rho", "adaptive", "perturb", "lr", "momentum", "dampening",
                                 "weight_decay", "nesterov"])
@pytest.mark.parametrize("grown", [False, True])
def test_a_deleted_key_is_refused_by_name(key, grown):
    pair = Beside("sgd", "reference")
    pair.step()
    opt, params = pair.ours.opt, pair.ours.params
    was = opt.param_groups[0].pop(key)
    if grown:
        opt.param_groups[0]["params"].append(params[4])
    pair.set(pair.ours, pair.gradients(3))
    assert_refused(opt, params, f"lacks '{key}'", (opt.first_step, opt.step))
    opt.param_groups[0][key] = was
    opt.first_step()
    opt.restore()


def test_the_count_of_steps_may_be_deleted_or_lack():
    """`interval` goes on where the groups that know are."""
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = SAM([p], torch.optim.SGD, lr=0.1, interval=2)
    opt.step()
    assert not opt.climbs_next
    group = {k: x for k, x in opt.param_groups[0].items() if k != "sam_steps"}
    opt.param_groups.insert(0, {**group, "params": [q]})
    assert not opt.climbs_next
    opt.step()
    assert opt.climbs_next and [g["sam_steps"] for g in opt.param_groups] == [2, 2]


@pytest.mark.parametrize("value", [2.5, 0, -1, "2", None, NAN, 2.0, torch.tensor(2)], ids=repr)
def test_an_interval_is_a_whole_number(value):
    with pytest.raises(ValueError, match="interval="):
        SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, interval=value)


@pytest.mark.parametrize("value", [0.5, -1, "2", None], ids=repr)
def test_a_start_is_a_whole_number(value):
    with pytest.raises(ValueError, match="start="):
        SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, start=value)


def test_numpy_integers_are_whole_numbers():
    opt = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, interval=np.int64(2))
    opt.step()
    assert not opt.climbs_next


# ---- AdamW stays AdamW


def test_adams_state_leaves_adamw_decoupled(backend):
    """torch.optim.AdamW keeps `decoupled_weight_decay` when it loads Adam's state."""
    pair = Beside("adamw", backend)
    pair.step()
    adam = Beside("adam", "reference")
    adam.step()
    pair.ours.opt.load_state_dict(adam.torch.opt.state_dict())
    pair.torch.opt.load_state_dict(adam.torch.opt.state_dict())
    for side in (pair.ours, pair.torch):
        assert side.opt.param_groups[0]["decoupled_weight_decay"] is True
        side.opt.param_groups[0]["weight_decay"] = 0.5
    pair.step(2)


# ---- rounding noise is no direction


@pytest.mark.parametrize("rho", [0.1, 1e4])
@pytest.mark.parametrize("convention", ["algorithm1", "official"])
def test_a_direction_that_is_rounding_noise_perturbs_nothing(rho, convention, backend):
    """The first m of Algorithm 1 is (1 - lmbda) g, so nothing of g is orthogonal to it; with the
    official code the first m is 0, and the climb goes along g."""
    p = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(1)))
    opt = FriendlySAM([p], torch.optim.SGD, rho=rho, lr=0.1, projection="orthogonal",
                      convention=convention, backend=backend)
    w = p.detach().clone()
    p.grad = torch.randn(50, generator=torch.Generator().manual_seed(2))
    opt.first_step()
    if convention == "algorithm1":
        assert torch.equal(p, w) and opt.last_radius == 0
    else:
        assert opt.last_radius == pytest.approx(rho, rel=1e-4)
    opt.second_step()
    assert opt.skipped_steps == 0 and not torch.equal(p, w)
    p.grad = torch.randn(50, generator=torch.Generator().manual_seed(3))
    opt.first_step()
    assert opt.last_radius == pytest.approx(rho, rel=1e-3)
    opt.restore()


# ---- what other launches, other ranks and infinite weights leave


@pytest.mark.parametrize("make, values", [
    (lambda p, **own: SAM(p, torch.optim.SGD, adaptive=True, **own), dict(adaptive=False)),
    (lambda p, **own: FisherSAM(p, torch.optim.SGD, eta=1.0, **own), dict(eta=0.0))])
def test_a_scaling_that_is_switched_off_leaves_nothing_in_the_norm(make, values, backend):
    """Kernels walk it in larger blocks then, and have fewer sums."""
    p = nn.Parameter(torch.linspace(-9, 9, 10_000))
    opt = make([p], rho=0.05, lr=0.1, backend=backend)
    for now in ({}, values, {}):
        opt.param_groups[0].update(now)
        p.grad = torch.full_like(p, 0.01)
        opt.first_step()
        norm, radius = opt.last_grad_norm, opt.last_radius
        p.grad = torch.full_like(p, 0.01)
        opt.second_step()
    assert norm == pytest.approx(1.0, rel=1e-5) and radius == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("name", ["asam-all", "fsam-cosine", "gsam", "looksam", "msam"])
def test_sums_that_lie_there_count_for_nothing(name, backend):
    """Of another launch, or of a rank with more programs, after an all-reduce."""
    def trained(leftovers):
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (700, 3)]
        opt = build(params, [dict(params=[0, 1], momentum=0.9)], name, backend)
        (own,) = opt.spaces
        for i in range(6):
            half = (opt.first_step, opt.second_step)[i % 2]
            for p in params:
                p.grad = (p.detach() + i) / 3
            if leftovers:
                own.radii.fill_(7)
                if name != "msam" or half == opt.second_step:  # whose step leaves the next norm
                    own.partials.fill_(7)
                if own.dots is not None:
                    own.dots.fill_(7)
            half()
            yield [*(p.detach().clone() for p in params)], opt.last_radius if i % 2 == 0 else None

    for (plain, radius), (after, found) in zip(trained(False), trained(True), strict=True):
        assert all(map(torch.equal, plain, after)) and radius == found


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of what is not taken
@pytest.mark.parametrize("base, more", [("SGD", {}), ("SGD", dict(momentum=0.9)), ("Adam", {})])
def test_an_infinite_weight_stays_without_weight_decay(base, more, backend):
    """As one that masks does; 0 times it is NaN."""
    p, q = (nn.Parameter(torch.tensor([-torch.inf, 1.0, 2.0, torch.inf])) for _ in "pq")
    opt = SAM([p], getattr(torch.optim, base), rho=0.0, lr=0.1, backend=backend, **more)
    plain = getattr(torch.optim, base)([q], lr=0.1, **more)
    for half in 2 * [opt.first_step, opt.second_step]:
        p.grad, q.grad = (torch.tensor([0.0, 0.1, 0.2, 0.0]) for _ in "pq")
        half()
        if half == opt.second_step:
            plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_bias_climbs_beside_adaptive_weights(backend):
    w, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.tensor([-torch.inf, 1.0]))
    opt = ASAM([w, b], torch.optim.SGD, scale="weights", lr=0.1, backend=backend)
    for half in (opt.first_step, opt.second_step):
        w.grad, b.grad = torch.ones(2, 2), torch.tensor([0.0, 1.0])
        half()
    assert opt.skipped_steps == 0
    assert b.tolist() == pytest.approx([-torch.inf, 0.9]) and (w < 0.95).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sam", "fsam", "gsam", "asam-all"])
@pytest.mark.interpreted(name=["sam", "fsam"])
def test_what_does_not_move_adds_nothing_to_the_radius(name, dtype, backend):
    """inf - inf is NaN."""
    p = nn.Parameter(torch.tensor([-torch.inf, 1.0, 2.0, torch.inf], dtype=dtype))
    q = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
    opt = build([p, q], [dict(params=[0, 1])], name, backend)
    p.grad, q.grad = p.new_zeros(4), q.new_tensor([torch.inf, 1])
    opt.first_step()
    assert opt.last_radius == 0
    opt.second_step()
    assert opt.skipped_steps == 1
    if name != "asam-all":  # infinite weights skip it
        before = p.detach().clone()
        p.grad, q.grad = p.new_tensor([0, 1, 2, 0]), torch.ones_like(q)
        opt.first_step()
        moved = (p - before)[1:3].detach().double().square().sum().sqrt()
        assert 0 < moved < opt.last_radius < 1
        opt.restore()
