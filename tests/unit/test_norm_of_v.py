"""Momentum-SAM's step leaves the norm of the new momentum to the next climb, which takes no pass
for it then. Whether it was left or taken is to be seen nowhere: the same bits either way."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam import GraphedStep, MomentumSAM
from fastsam.choose import BACKENDS

from ..helpers.contract import assert_bits, backward, batch, bits, network
from ..helpers.drawn import normals

BASES = {
    "sgd": (torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01, dampening=0.1)),
    "adamw": (torch.optim.AdamW, dict(lr=0.02, weight_decay=0.1)),
}
SHAPES = [(1100,), (5, 3), (1,), (1027,), (), (64,), (0,)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:the weights are 16-bit:UserWarning"),
    pytest.mark.filterwarnings("ignore:second_step with:UserWarning"),
]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


def misaligned(tensors) -> list[torch.Tensor]:
    return [torch.cat([t.flatten()[:1], t.flatten()])[min(1, t.numel()):].view(t.shape)
            for t in tensors]


def optimizer(params, base: str, backend: str, **own) -> MomentumSAM:
    kind, hyper = BASES[base]
    return MomentumSAM([dict(params=params[:3]), dict(params=params[3:5], lr=0.01, rho=0.1),
                        dict(params=params[5:], perturb=False)],
                       kind, rho=0.3, backend=backend, **{**hyper, **own})


def hand_over(params, grads) -> None:
    """As they are: a copy would be aligned."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def left(opt) -> bool:
    return opt._phase.layout.has_norm()


def partials(opt) -> list[torch.Tensor]:
    return [space.partials[0].clone() for space in opt.spaces]


def assert_left_is_taken(opt) -> None:
    """What was left has the bits of what a pass takes."""
    assert left(opt)
    found = partials(opt)
    opt._phase.layout.keep_norm(None)
    opt.first_step()
    for x, y in zip(found, partials(opt), strict=True):
        assert torch.equal(x, y)
    opt.restore()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype, masters, shifted", [
    (torch.float32, False, True), (torch.bfloat16, True, False)], ids=str)
def test_what_a_step_leaves_is_what_a_pass_takes(base, dtype, masters, shifted, backend, device):
    params = [nn.Parameter(t.to(device)) for t in normals(SHAPES, 0, dtype)]
    opt = optimizer(params, base, backend, master_weights=masters)
    assert not left(opt)
    for t in range(3):
        opt.first_step()
        grads = normals(SHAPES, 10 + t, dtype, device)
        hand_over(params, misaligned(grads) if shifted else grads)
        if t == 2:
            params[0].grad = params[5].grad = None
        if t == 1:
            opt.found_inf = torch.ones((), device=device)
        opt.second_step(zero_grad=True)
        opt.found_inf = None
        assert_left_is_taken(opt)
    assert opt.skipped_steps == 1 and opt.last_grad_norm > 0


def test_a_v_that_is_not_finite_is_left_so(backend, device):
    params = [nn.Parameter(t.to(device)) for t in normals(SHAPES, 0)]
    opt = optimizer(params, "sgd", backend)
    hand_over(params, normals(SHAPES, 1, device=device))
    params[0].grad[3] = torch.inf
    for _ in range(3):
        opt.first_step()
        opt.second_step()
        assert_left_is_taken(opt)
    assert opt.skipped_steps == 2


@pytest.mark.parametrize("base", BASES)
def test_a_skip_leaves_it_after_a_new_layout_too(base, backend, device):
    """What climbed is known there, but not where its v lay."""
    params = [nn.Parameter(t.to(device)) for t in normals(SHAPES, 0)]
    opt = optimizer(params, base, backend)
    for t in range(3):
        opt.first_step()
        hand_over(params, normals(SHAPES, 10 + t, device=device))
        if t == 2:
            v = opt.state[params[0]]["momentum_buffer" if base == "sgd" else "exp_avg"]
            v.data = v.data.clone()
            opt.found_inf = torch.ones((), device=device)
        opt.second_step(zero_grad=True)
        opt.found_inf = None
        assert_left_is_taken(opt)
    assert opt.skipped_steps == 1


def test_a_step_without_a_gradient_leaves_it_too(backend, device):
    params = [nn.Parameter(t.to(device)) for t in normals(SHAPES, 0)]
    opt = optimizer(params, "sgd", backend)
    hand_over(params, normals(SHAPES, 1, device=device))
    for _ in range(2):
        opt.first_step()
        opt.second_step(zero_grad=True)
        assert_left_is_taken(opt)


# ---- what torch's version counter does not see


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SEEN = {
    "in place": lambda v: v.mul_(3),
    "through a view": lambda v: v.detach().view(-1).mul_(3),
    "foreach": lambda v: torch._foreach_mul_([v], 3.0),
    "inference mode": torch.inference_mode()(lambda v: v.mul_(3)),
}
NOT_SEEN = {
    "data": lambda v: v.data.mul_(3),
    "numpy": lambda v: np.multiply(v.numpy(), 3, out=v.numpy()),
    "dlpack": lambda v: torch.from_dlpack(v).mul_(3),
    "all_reduce": lambda v: (v.data.mul_(3), dist.all_reduce(v)),
    "broadcast": lambda v: (v.data.mul_(3), dist.broadcast(v, 0)),
}


@pytest.mark.parametrize("way", [*SEEN, *NOT_SEEN])
@pytest.mark.parametrize("name", ["numba", "reference"])  # the host sees to it
def test_a_write_that_torch_does_not_count_is_climbed_along_by_the_old_length_once(
        name, way, alone):
    """As the class says; `increment_version` tells of it."""
    params = [nn.Parameter(t) for t in normals(SHAPES, 0)[:3]]
    opt = MomentumSAM(params, torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9, backend=name)
    write = SEEN.get(way) or NOT_SEEN[way]

    def radius() -> float:
        """By which it climbs, along v."""
        w = [p.detach().clone() for p in params]
        opt.first_step()
        moved = torch.cat([(p.detach() - x).flatten() for p, x in zip(params, w, strict=True)])
        v = torch.cat([opt.state[p]["momentum_buffer"].flatten() for p in params])
        assert torch.cosine_similarity(moved, -v, dim=0) > 1 - 1e-5
        assert opt.last_radius == pytest.approx(float(moved.norm()), rel=1e-4)
        return opt.last_radius

    def a_step_and_a_write() -> list:
        opt.first_step()
        hand_over(params, normals(SHAPES, 1)[:3])
        opt.second_step()
        vs = [opt.state[p]["momentum_buffer"] for p in params]
        for v in vs:
            write(v)
        return vs

    a_step_and_a_write()
    assert radius() == pytest.approx(0.5 if way in SEEN else 1.5, rel=1e-4)
    opt.second_step()
    assert radius() == pytest.approx(0.5, rel=1e-4), "the step left the norm of its own v"
    opt.restore()
    torch.autograd.graph.increment_version(a_step_and_a_write())
    assert radius() == pytest.approx(0.5, rel=1e-4)


# ---- every event beside a twin that takes the norm at every climb


def set_values(opt, rng) -> None:
    group = rng.choice(opt.param_groups)
    group[rng.choice(("lr", "rho", "weight_decay"))] = rng.random()


def perturb_others(opt, rng) -> None:
    group = opt.param_groups[rng.choice((0, 2))]
    group["perturb"] = not group["perturb"]


def edit_in_place(opt, rng) -> None:
    entry = opt.state[rng.choice(opt.param_groups[0]["params"])]
    entry.get("momentum_buffer", entry.get("exp_avg")).mul_(rng.random())


def replace(opt, rng) -> None:
    entry = opt.state[rng.choice(opt.param_groups[1]["params"])]
    name = "momentum_buffer" if "momentum_buffer" in entry else "exp_avg"
    entry[name] = entry[name] * 2 + 0.25


def clear(opt, rng) -> None:
    opt.state[rng.choice(opt.param_groups[0]["params"])].clear()


def load(opt, rng) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def climb_in_vain(opt, rng) -> None:
    opt.first_step()
    opt.restore()


def plain_step(opt, rng) -> None:
    opt.step()


def plain_skip(opt, rng) -> None:
    opt.found_inf = torch.ones(())
    opt.step()
    opt.found_inf = None


def skip(opt, rng) -> None:
    opt.first_step()
    plain_skip(opt, rng)


def edit_while_moved(opt, rng) -> None:
    opt.first_step()
    edit_in_place(opt, rng)
    rng.choice((plain_step, plain_skip))(opt, rng)


def half_a_step_of_each(opt, rng) -> None:
    """A gradient in some parameters only."""
    opt.first_step()
    some = opt.param_groups[0]["params"][1]
    g, some.grad = some.grad, None
    opt.step()
    some.grad = g


def regroup(opt, rng) -> None:
    opt.param_groups[0]["params"].reverse()


def freeze(opt, rng) -> None:
    """A frozen parameter has no gradient any more."""
    some = rng.choice(opt.param_groups[rng.choice((0, 2))]["params"])
    some.requires_grad_(not some.requires_grad)
    if not some.requires_grad:
        some.grad = None


EVENTS = [freeze, set_values, perturb_others, edit_in_place, replace, clear, load, climb_in_vain,
          plain_step, plain_skip, skip, edit_while_moved, half_a_step_of_each, regroup]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["numba", "reference"])
def test_no_course_of_events_tells_whether_the_norm_was_left(base, name):
    a_course_of_events(base, name, 150)


@pytest.mark.long
@pytest.mark.parametrize("base", BASES)
def test_nor_in_triton_s_interpreter(base):
    a_course_of_events(base, "triton", 40)


def a_course_of_events(base, backend, events):
    draws = [random.Random(3), random.Random(3)]
    params = [[nn.Parameter(t) for t in normals(SHAPES, 0)] for _ in draws]
    opt, twin = (optimizer(ps, base, backend) for ps in params)
    times_left = 0
    for t in range(events):
        for ps in params:
            hand_over(ps, normals(SHAPES, 20 + t))
        event = draws[0].choice(EVENTS)
        assert draws[1].choice(EVENTS) is event
        for o, rng in ((opt, draws[0]), (twin, draws[1])):
            event(o, rng)
            if t % 2:
                times_left += o is opt and left(o)
                o.first_step()
                o.second_step()
            if o is twin:
                o._phase.layout.keep_norm(None)
        assert opt.state_dict()["state"].keys() == twin.state_dict()["state"].keys()
        for p, q in zip(*params, strict=True):
            assert torch.equal(p, q), f"{event.__name__}, {t}"
            for name, x in opt.state[p].items():
                assert torch.equal(x, twin.state[q][name]), f"{name} after {event.__name__}, {t}"
    assert times_left > events // 20, "the norm was hardly ever left"


# ---- when a step leaves it


def test_what_makes_a_climb_take_the_norm_itself():
    backend = "reference"  # the host sees to it
    params = [nn.Parameter(t) for t in normals(SHAPES, 0)]
    opt = optimizer(params, "sgd", backend)
    hand_over(params, normals(SHAPES, 1))

    def take_a_step():
        opt.first_step()
        opt.second_step()
        assert left(opt)

    def buffer():
        return opt.state[params[0]]["momentum_buffer"]

    for change, is_left in (
            (lambda: None, True), (lambda: opt.param_groups[0].update(lr=0.3, rho=1.0), True),
            (lambda: opt.state_dict(), True), (lambda: climb_in_vain(opt, None), True),
            (lambda: buffer().add_(1), False), (lambda: buffer().detach()[:2].zero_(), False),
            (lambda: opt.param_groups[2].update(perturb=True), False),
            (lambda: params[1].requires_grad_(False), False),
            (lambda: params[1].requires_grad_(True), False),
            (lambda: opt.state[params[1]].update(momentum_buffer=torch.ones_like(params[1])),
             False),
            (lambda: opt.load_state_dict(copy.deepcopy(opt.state_dict())), False),
            (lambda: opt.step(), False),
            (lambda: opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))])), False)):
        take_a_step()
        change()
        opt._follow()
        assert left(opt) == is_left


def test_copies_and_continued_trainings_have_the_bits(backend, device):
    net = network(device)
    opt = MomentumSAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.05, momentum=0.9,
                      backend=backend)
    for i in range(3):
        opt.step(lambda i=i: backward(net, i, device))
    twin, other = copy.deepcopy((net, opt))
    assert left(opt) and not left(other)
    for i in range(3, 6):
        opt.step(lambda i=i: backward(net, i, device))
        other.step(lambda i=i: backward(twin, i, device))
        assert_bits(net, bits(twin))


def test_interval_and_start_have_the_bits_too(backend, device):
    nets = [network(device) for _ in range(2)]
    opts = [MomentumSAM(n.parameters(), torch.optim.SGD, rho=0.3, lr=0.05, momentum=0.9,
                        interval=2, start=1, backend=backend) for n in nets]
    for i in range(6):
        opts[1]._phase.layout.keep_norm(None)
        for n, o in zip(nets, opts, strict=True):
            o.step(lambda n=n, i=i: backward(n, i, device))
        assert_bits(nets[0], bits(nets[1]))
        assert left(opts[0]) == (i % 2 == 1)


def test_a_graph_s_replays_leave_and_find_it(device):
    """On a CPU the same step without a graph, so that what is around a replay is called by hand."""
    net, twin = network(device), network(device)
    opt, plain = (MomentumSAM(n.parameters(), torch.optim.SGD, rho=0.3, lr=0.05, momentum=0.9)
                  for n in (net, twin))
    step = GraphedStep(net, cross_entropy, opt, batch(0, device))
    for i in range(6):
        if i == 2:
            for o, n in ((opt, net), (plain, twin)):
                o.state[n.head.bias]["momentum_buffer"].mul_(0.5)
        step(*batch(i, device))
        plain._phase.layout.keep_norm(None)
        plain.step(lambda i=i: backward(twin, i, device))
        assert_bits(net, bits(twin))
