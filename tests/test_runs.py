"""Small neighbours taken as one by the reference: what is done does not grow with their number,
and nobody else can tell."""

import pytest
import torch

from fastsam import ASAM, SAM, FriendlySAM, reference, runs
from fastsam.runs import Run

from .test_launches import BASES, Executed

SHAPES = [(5, 3), (17,), (2, 2, 3, 3), (1,), (33,), (0,), (4, 4)]


@pytest.fixture(autouse=True)
def real_sizes(monkeypatch):
    monkeypatch.setattr(runs, "LARGE", 2**16)
    monkeypatch.setattr(Run, "MOST", 2**18)


def parameters(shapes=SHAPES, dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def a_step(opt, params, t: int, without=()) -> None:
    generator = torch.Generator().manual_seed(t)
    for call in (opt.first_step, opt.second_step):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator).to(p)
            p.grad = None if i in without else g
        call()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "in their own memory"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cls", [SAM, ASAM, FriendlySAM])
def test_operations_do_not_grow_with_the_number_of_tensors(cls, base, packed):
    counts = []
    for n in (5, 80):
        params = parameters(n * [(3, 4)])
        opt = cls(params, BASES[base][0], backend="reference", **BASES[base][1])
        if not packed:
            for p in params:
                p.data = p.data.clone()
        a_step(opt, params, 0)
        for p in params:
            p.grad = torch.ones_like(p)
        with Executed() as first:
            opt.first_step()
        with Executed() as second:
            opt.second_step()
        counts.append((first.names, second.names))
    assert counts[0] == counts[1]
    assert 0 < len(counts[0][0]) < 50 and 0 < len(counts[0][1]) < 50


@pytest.mark.parametrize("base", ["dampened", *BASES])
def test_tensors_of_one_run_count_their_own_steps(base):
    """Against the same steps slot by slot; a climb of radius 0, so that no sum's order matters."""
    kind, hyper = BASES.get(base, (torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.3)))
    found = []
    for most in (2**18, 1):
        Run.MOST = most
        params = parameters()
        opt = FriendlySAM(params, kind, rho=0.0, convention="official", backend="reference",
                          **hyper)
        for t, without in enumerate([(1, 4), (), (0, 1, 6), ()]):
            a_step(opt, params, t, without)
        found.append([*params, *(x for state in opt.state.values() for x in state.values())])
        steps = [state["ema_steps"].item() for state in opt.state.values()]
        assert steps == [3, 2, 4, 4, 3, 4, 3]
    assert all(map(torch.equal, *found))


def test_runs_end_where_groups_scalings_and_missing_gradients_begin(monkeypatch):
    monkeypatch.setattr(runs, "LARGE", 40)
    monkeypatch.setattr(Run, "MOST", 60)
    shapes = [(41,), (39,), (25,), (10, 2), (6, 3), (17,), (16,), (15,), (14,)]
    names = ["a", "b", "c", "d.weight", "e.weight", "f", "g", "h", "i"]
    params = parameters(shapes)
    groups = [{"params": list(zip(names, params, strict=True))[:8]},
              {"params": [("i", params[8])]}]
    opt = ASAM(groups, torch.optim.SGD, scale="weights", lr=0.1, backend="reference")
    for p in params:
        p.grad = torch.ones_like(p)
    params[6].grad = None
    space, = opt._spaces
    for slot, g in opt._gradients():
        slot.g1 = g
    found = [[tuple(s.param.shape) for s in slots] for _, slots in runs.parts(space, "g1")]
    assert found == [[(41,)], [(39,)], [(25,)], [(10, 2), (6, 3)], [(17,)], [(15,)], [(14,)]]


@pytest.mark.parametrize("cls, base, hyper", [
    (FriendlySAM, torch.optim.SGD, dict(adaptive=True, lr=0.1, momentum=0.9, weight_decay=0.1)),
    (ASAM, torch.optim.AdamW, dict(scale="weights", lr=0.1)),
    (SAM, torch.optim.Adam, dict(lr=0.1, eps=0.0)),
], ids=["fasam", "asam-adamw", "adam-without-eps"])
def test_what_lies_between_the_tensors_stays_zero(cls, base, hyper):
    params = parameters()
    opt = cls(params, base, rho=0.5, backend="reference", **hyper)
    for t in range(4):
        a_step(opt, params, t)
    params[1].grad.fill_(torch.nan)
    opt.first_step()
    opt.second_step()
    assert opt.skipped_steps == 1
    space, = opt._spaces
    between = torch.ones(space.size, dtype=torch.bool)
    for slot in space.slots:
        between[slot.offset:slot.offset + slot.w.numel()] = False
    assert between.sum() > 40
    for flat in (space.flat_w, space.backup, space.m, space.v, space.u, *space.scratch.values()):
        assert flat is None or not flat[between[-len(flat):]].any()
    assert all(p.isfinite().all() for p in params)


def test_a_loaded_state_heals_what_a_bad_learning_rate_has_done():
    params = parameters()
    opt = ASAM(params, torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9, backend="reference")
    a_step(opt, params, 0)
    weights, state = [p.detach().clone() for p in params], opt.state_dict()
    state["state"] = {i: {k: x.clone() for k, x in s.items()} for i, s in state["state"].items()}
    opt.param_groups[0]["lr"] = torch.nan
    a_step(opt, params, 1)
    with torch.no_grad():
        for p, w in zip(params, weights, strict=True):
            p.copy_(w)
    opt.load_state_dict(state)
    a_step(opt, params, 2)
    assert opt.skipped_steps == 0 and 0 < opt.last_radius < 1


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "in their own memory"])
def test_an_interrupted_climb_is_taken_back(packed, monkeypatch):
    monkeypatch.setattr(Run, "MOST", 40)
    params = parameters()
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, backend="reference")
    if not packed:
        for p in params:
            p.data = p.data.clone()
    before, climb_slot, calls = [p.detach().clone() for p in params], reference.climb_slot, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return climb_slot(*args)

    monkeypatch.setattr(reference, "climb_slot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        a_step(opt, params, 0)
    assert not opt.is_perturbed and all(map(torch.equal, params, before))


def test_autograd_sees_that_the_weights_moved():
    """The writes go to the flat buffer, and a backward through the old weights must not pass."""
    params = parameters()
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, backend="reference")
    loss = sum(p.square().sum() for p in params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
