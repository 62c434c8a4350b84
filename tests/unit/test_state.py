"""Saving, loading, copying: every way continues bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fastsam import SAM, FriendlySAM, FullGradientSAM

from ..helpers.contract import (
    HYPER,
    assert_bits,
    backward,
    bits,
    build,
    network,
    pytest_generate_tests,  # noqa: F401
    trained,
    two_passes,
)


@pytest.mark.parametrize("way", ["torch.save", "deepcopy", "pickle"])
def test_save_load_continue_is_bit_equal(variant, backend, device, way):
    net, opt = trained(variant, backend, device)
    twin = network(device)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save([net.state_dict(), opt.state_dict()], file)
        file.seek(0)
        model_state, state = torch.load(file, weights_only=True)
        twin.load_state_dict(model_state)
        other = build(twin, variant, backend, lr=0.5, weight_decay=0.1)
        other.load_state_dict(state)
    elif way == "deepcopy":
        twin, other = copy.deepcopy((net, opt))
    else:
        twin, other = pickle.loads(pickle.dumps((net, opt)))
    state = other.state_dict()["state"][0]
    assert state.get("momentum_buffer", state.get("exp_avg")).abs().sum() > 0
    for i in range(3, 6):
        two_passes(net, opt, i, device)
        two_passes(twin, other, i, device)
        assert_bits(net, bits(twin))


def test_a_pickled_optimizer_is_whole(backend, device):
    """A schedule, a skip, a restore and its state, not only the next weights."""
    net, opt = trained("fsam", backend, device)
    twin, other = pickle.loads(pickle.dumps((net, opt)))
    for n, o in ((net, opt), (twin, other)):
        o.param_groups[0]["lr"] = 0.01
        backward(n, 3, device)
        n.head.bias.grad[0] = torch.nan
        o.first_step()
        o.second_step(zero_grad=True)
        two_passes(n, o, 4, device)
        backward(n, 5, device)
        w = bits(n)
        o.first_step()
        o.restore()
        assert_bits(n, w)
        assert o.skipped_steps == 1
    assert_bits(net, bits(twin))
    for i, entry in opt.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, other.state_dict()["state"][i][name]), name


def test_a_state_of_another_model_changes_nothing(backend, device):
    net, opt = trained("fsam", backend, device)
    before = copy.deepcopy(opt.state_dict())
    for key, value, match in (("ema", torch.ones(3), "does not fit"),
                              ("momentum_buffer", torch.ones(1, 1), "does not fit")):
        state = copy.deepcopy(before)
        state["param_groups"][0]["lr"] = 9.0
        state["state"][0][key] = value
        with pytest.raises(ValueError, match=match):
            opt.load_state_dict(state)
    maximizing = torch.optim.SGD(network(device).parameters(), lr=9.0, maximize=True)
    with pytest.raises(ValueError, match="maximize=True"):
        opt.load_state_dict(maximizing.state_dict())
    fewer = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=9.0)
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(fewer.state_dict())
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(x, after["state"][i][k]) for i, entry in before["state"].items()
               for k, x in entry.items())


@pytest.mark.parametrize("wrong, said", [
    (lambda net, opt: {"model": net.state_dict(), "opt": opt.state_dict()}, "'model', 'opt'"),
    (lambda net, opt: net.state_dict(), "'conv.weight'"), (lambda net, opt: {}, "nothing"),
    (lambda net, opt: {"param_groups": opt.state_dict()["param_groups"]}, "without 'state'"),
    (lambda net, opt: "last.pt", "a str"), (lambda net, opt: None, "a NoneType"),
    (lambda net, opt: opt, "a SAM")],
    ids=["checkpoint", "model", "nothing", "groups", "path", "None", "optimizer"])
def test_what_is_no_state_is_refused_in_words(wrong, said, device):
    net = network(device)
    opt = SAM(net.parameters(), torch.optim.SGD, lr=0.1)
    before = opt.state_dict()
    with pytest.raises(ValueError, match=f"{said}.*state_dict"):
        opt.load_state_dict(wrong(net, opt))
    assert opt.state_dict()["param_groups"] == before["param_groups"]


def test_group_keys_that_a_state_lacks_stay(device):
    ps = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = SAM([dict(params=[ps[0]], rho=0.3), dict(params=[ps[1]], perturb=False)],
              torch.optim.SGD, lr=0.1)
    plain = torch.optim.SGD([dict(params=[ps[0]]), dict(params=[ps[1]])], lr=0.5)
    opt.load_state_dict(plain.state_dict())
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.5]
    assert opt.param_groups[0]["rho"] == 0.3 and opt.param_groups[1]["perturb"] is False


def test_the_published_fsam_state_keeps_its_average(device):
    net, opt = trained("fsam-official", "reference", device)
    state = opt.state_dict()
    published = {i: {"old_p": x["ema"], "momentum": x["ema"]} for i, x in state["state"].items()}
    other = build(network(device), "fsam-official", "reference")
    other.load_state_dict({**state, "state": published})
    for i, entry in other.state_dict()["state"].items():
        assert torch.equal(entry["ema"], state["state"][i]["ema"]) and entry["ema_steps"] == 1


def test_a_torch_sgd_state_is_taken_over(backend, device):
    net, twin = network(device), network(device)
    base = torch.optim.SGD(twin.parameters(), **HYPER)
    for i in range(2):
        base.zero_grad()
        backward(twin, i, device)
        base.step()
    net.load_state_dict(twin.state_dict())
    opt = build(net, "sam", backend)
    opt.load_state_dict(base.state_dict())
    assert opt.param_groups[0]["rho"] == 0.08
    wrapped = copy.deepcopy(twin)
    inner = torch.optim.SGD(wrapped.parameters(), **HYPER)
    inner.load_state_dict(base.state_dict())
    outer = SAM.wrap(inner, rho=0.08, backend=backend)
    for i in range(2, 4):
        two_passes(net, opt, i, device)
        two_passes(wrapped, outer, i, device)
        assert_bits(net, bits(wrapped))


def test_the_public_class_state_with_old_p_is_tolerated(backend, device):
    net, opt = trained("sam", backend, device)
    state = opt.state_dict()
    state["state"] = {0: {"old_p": torch.zeros(1)}}
    opt.load_state_dict(state)
    assert "old_p" not in opt.state_dict()["state"][0]


# ---- parameters whose memory someone re-ordered, as model.to(memory_format=...) does


def reordered(backend, device, **kwargs):
    """An optimizer with state, its parameter, and that state, before the next step sees that the
    parameter has other strides."""
    p = nn.Parameter(torch.randn(3, 5, device=device))
    opt = FriendlySAM([p], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend, **kwargs)
    p.grad = torch.randn(3, 5, device=device)
    opt.first_step()
    opt.second_step()
    before = {k: x.clone() for k, x in opt.state[p].items()}
    p.data = p.data.t().contiguous().t()
    return p, opt, before


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_reordered_parameter_keeps_its_state(backend, device, way):
    p, opt, before = reordered(backend, device, momentum=0.9)
    copied = copy.deepcopy((p, opt)) if way == "deepcopy" else pickle.loads(pickle.dumps((p, opt)))
    for q, o in (copied, (p, opt)):
        for name, value in before.items():
            assert torch.equal(o.state[q][name], value), name


def test_momentum_that_begins_after_a_reordering_leaves_the_average_alone(device):
    p, opt, before = reordered("reference", device)
    late = nn.Parameter(torch.randn(4, device=device, dtype=torch.bfloat16))
    opt.add_param_group(dict(params=[late], momentum=0.9))
    p.grad = torch.zeros(3, 5, device=device)
    opt.first_step()
    opt.restore()
    assert torch.equal(opt.state[p]["ema"], 0.9 * before["ema"])


# ---- a load that fails


class OwnAdam(torch.optim.Adam):
    """Not fused. Adam's own load fails on another's state when it has put that in."""


class OwnAdadelta(torch.optim.Adadelta):
    pass


class Around(torch.optim.Optimizer):
    """Wraps another, which loads first."""

    def __init__(self, params, **hyper):
        self.inner = OwnAdam(params, **hyper)
        super().__init__(self.inner.param_groups, {})
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self, closure=None):
        self.inner.step()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        raise ArithmeticError


def of_another_base(opt, state):
    """SGD's state, which neither OwnAdam nor OwnAdadelta can use."""
    state["state"] = {i: {"momentum_buffer": torch.ones(s["sam_ema"].shape)}
                      for i, s in state["state"].items()}


def a_hook(opt, state):
    def fail(*_):
        raise ArithmeticError
    return opt.base_optimizer.register_load_state_dict_pre_hook(fail)


def a_late_hook(opt, state):
    def fail(*_):
        raise ArithmeticError
    return opt.base_optimizer.register_load_state_dict_post_hook(fail)


def no_steps(opt, state):
    state["param_groups"][0]["sam_steps"] = "x"


def no_key(opt, state):
    """Neither the state nor the optimizer has it."""
    del state["param_groups"][0]["lmbda"]
    lmbda = opt.param_groups[0].pop("lmbda")
    return lambda: opt.param_groups[0].update(lmbda=lmbda)


def built(base):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    return params, FriendlySAM([{"params": [p]} for p in params], base, rho=0.1, lr=0.1)


def assert_steps_alike(params, opt, theirs, other):
    for i in range(2):
        for half in (opt.first_step, opt.second_step), (other.first_step, other.second_step):
            for step in half:
                for p in (*params, *theirs):
                    p.grad = (p.detach() + i).cos()
                step()
    for p, q in zip(params, theirs, strict=True):
        assert torch.equal(p, q)


# Adadelta finds another's state out in its next step, and a fused base loads nothing itself
@pytest.mark.parametrize("base, fault", [
    *((OwnAdam, x) for x in (of_another_base, a_hook, a_late_hook, no_steps, no_key)),
    *((Around, x) for x in (of_another_base, a_hook, a_late_hook, no_steps, no_key)),
    *((OwnAdadelta, x) for x in (a_hook, a_late_hook, no_steps, no_key)),
    *((torch.optim.AdamW, x) for x in (no_steps, no_key))])
def test_a_load_that_fails_changes_nothing(base, fault):
    params, opt = built(base)
    theirs, other = built(base)
    assert_steps_alike(params, opt, theirs, other)
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        group.update(lr=7.0, rho=0.7)
    undo = fault(opt, state)
    lists, groups = opt.param_groups, [dict(group) for group in opt.param_groups]
    dicts, whole = list(opt.param_groups), opt.state
    entries = {p: (s, dict(s)) for p, s in opt.state.items()}
    with pytest.raises((ValueError, KeyError, ArithmeticError)):
        opt.load_state_dict(state)
    assert opt.param_groups is opt.base_optimizer.param_groups is lists
    assert all(x is y for x, y in zip(lists, dicts, strict=True)) and lists == groups
    assert opt.state is opt.base_optimizer.state is whole and whole.keys() == entries.keys()
    for p, (entry, was) in entries.items():
        assert whole[p] is entry and entry.keys() == was.keys()
        assert all(entry[name] is x for name, x in was.items())
    if undo is not None:
        undo.remove() if hasattr(undo, "remove") else undo()
    assert_steps_alike(params, opt, theirs, other)


def test_a_state_loads_into_groups_that_were_replaced():
    params, opt = built(OwnAdam)
    opt.param_groups = [{**opt.param_groups[0], "params": params}]
    theirs, other = built(OwnAdam)
    other.param_groups = [{**other.param_groups[0], "params": theirs}]
    assert_steps_alike(params, opt, theirs, other)
    state = copy.deepcopy(opt.state_dict())
    theirs, other = built(OwnAdam)
    other.param_groups = [{**other.param_groups[0], "params": theirs}]
    other.load_state_dict(state)
    for p, q in zip(params, theirs, strict=True):
        q.data.copy_(p)
    assert_steps_alike(params, opt, theirs, other)


EDITS = {  # of a new optimizer's parameters, after which they are its `theirs`
    "append": (lambda p, q, r: [p], lambda ps, q: ps.append(q)),
    "replace": (lambda p, q, r: [p, r], lambda ps, q: ps.__setitem__(1, q)),
    "remove": (lambda p, q, r: [p, q, r], lambda ps, q: ps.pop()),
    "reorder": (lambda p, q, r: [q, p], lambda ps, q: ps.reverse()),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("base", [torch.optim.AdamW, OwnAdam])
def test_a_state_loads_into_groups_whose_parameters_were_edited(base, edit):
    params, theirs = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
                      for _ in range(2))
    opt = FriendlySAM(params, base, rho=0.1, lr=0.1)
    assert_steps_alike(params, opt, params, opt)
    state = copy.deepcopy(opt.state_dict())
    begin, change = EDITS[edit]
    other = FriendlySAM(begin(*theirs, nn.Parameter(torch.ones(5))), base, rho=0.1, lr=0.1)
    change(other.param_groups[0]["params"], theirs[1])
    other.load_state_dict(state)
    for i, saved in other.state_dict()["state"].items():
        assert saved.keys() == state["state"][i].keys()
        assert all(torch.equal(x, state["state"][i][name]) for name, x in saved.items())
    for p, q in zip(params, theirs, strict=True):
        q.data.copy_(p)
    assert_steps_alike(params, opt, theirs, other)


@pytest.mark.parametrize("base", [torch.optim.AdamW, OwnAdam, OwnAdadelta])
def test_a_load_leaves_the_callers_state_as_it_was(base):
    """Also where a hook puts something else into it, and where it is trained on."""
    params, opt = built(base)
    theirs, other = built(base)
    assert_steps_alike(params, opt, theirs, other)
    state = opt.state_dict()
    was = copy.deepcopy(state)
    parts = {key: state[key] for key in state}

    def hook(optimizer, given):
        given["param_groups"] = [dict(group, lr=9.0) for group in given["param_groups"]]
        given["state"] = dict(given["state"])
        given["more"] = 1

    other.register_load_state_dict_pre_hook(hook)
    other.load_state_dict(state)
    assert [group["lr"] for group in other.param_groups] == [9.0, 9.0]
    for group in other.param_groups:
        group["lr"] = 7.0
    assert state.keys() == parts.keys() and all(state[key] is x for key, x in parts.items())
    assert state["param_groups"] == was["param_groups"]
    for i, entry in was["state"].items():
        assert entry.keys() == state["state"][i].keys()
        assert all(torch.equal(x, state["state"][i][name]) for name, x in entry.items())


def test_a_full_gradient_is_found_beside_an_entry_that_is_no_parameters():
    class Counts(OwnAdam):
        def step(self, closure=None):
            super().step()
            self.state["k"] = torch.ones(2)

    p = nn.Parameter(torch.ones(3))
    opt = FullGradientSAM([p], Counts, part="full", lr=0.1)
    p.grad = torch.ones(3)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(state)
    assert torch.equal(opt.state["k"], torch.ones(2))
