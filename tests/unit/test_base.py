"""The base optimizer itself, which users save, load and step, and on which they put hooks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastsam import SAM, FriendlySAM, FullGradientSAM, PhaseError
from fastsam.choose import BACKENDS

BASES = {"sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01)),
         "adamw": (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
         "rmsprop": (torch.optim.RMSprop, dict(lr=0.01))}
FUSED = ["sgd", "adamw"]


def build(base):
    kind, hyper = BASES[base]
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.arange(6.0).reshape(2, 3).sin())
        net.bias.fill_(0.3)
    return net, SAM(net.parameters(), kind, rho=0.1, backend="reference", **hyper)


def backward(net, i, scaler=None):
    net.zero_grad()
    loss = (net(torch.arange(12.0).reshape(4, 3).add(i).cos()) - 1).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def step(net, opt, i):
    backward(net, i)
    opt.first_step(zero_grad=True)
    backward(net, i)
    opt.second_step()


@pytest.mark.parametrize("base", BASES)
def test_the_base_saved_and_loaded_by_itself_continues(base):
    net, opt = build(base)
    for i in range(3):
        step(net, opt, i)
    saved = copy.deepcopy(opt.base_optimizer.state_dict())
    other, resumed = build(base)
    other.load_state_dict(net.state_dict())
    resumed.base_optimizer.load_state_dict(saved)
    for i in range(3, 6):
        step(net, opt, i)
        step(other, resumed, i)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("way", ["a step", "a replay"])
@pytest.mark.parametrize("base", BASES)
def test_a_count_of_steps_that_the_base_loads_is_gone_on_from(base, way):
    kind, hyper = BASES[base]
    net, _ = build(base)
    inner = kind(net.parameters(), **hyper)
    opt = SAM.wrap(inner, rho=0.1, interval=3)
    state = copy.deepcopy(inner.state_dict())
    state["param_groups"][0]["sam_steps"] = 4
    inner.load_state_dict(state)
    assert not opt.climbs_next
    inner.load_state_dict(state)
    if way == "a step":
        backward(net, 0)
        opt.step()
    else:
        with opt.replay():
            pass
    assert opt.param_groups[0]["sam_steps"] == 5


def replaced(cls=SAM, *args):
    """An optimizer whose base was given another parameter, which has a gradient of 2."""
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    inner = torch.optim.SGD([p], lr=0.1)
    opt = cls.wrap(inner, *args, rho=0.0)
    inner.param_groups = [{**inner.param_groups[0], "params": [q], "lr": 0.25}]
    q.grad = torch.full_like(q, 2.0)
    return q, opt


def test_groups_that_the_base_was_given_are_everybodys():
    q, opt = replaced()
    assert "lr: 0.25" in repr(opt)
    q, opt = replaced()
    assert opt.is_perturbed is False and copy.deepcopy(opt).param_groups[0]["lr"] == 0.25
    q, opt = replaced()
    opt.zero_grad()
    assert q.grad is None
    q, opt = replaced()
    opt.step(lambda: (3 * q).sum().backward())
    assert q.item() == 0.25  # 1 - 0.25 * 3
    q, opt = replaced()
    opt.stash_grad()
    assert q.grad is None
    opt.unstash_grad()
    assert q.grad.item() == 2.0
    q, opt = replaced(FullGradientSAM, "full")
    opt.set_full_gradient()
    assert opt.state[q]["full_gradient"].item() == 2.0
    q, opt = replaced(FullGradientSAM, "full")
    opt.measure_full_gradient([5.0, 7.0], lambda x: ((x * q).sum(), 1))
    assert opt.state[q]["full_gradient"].item() == 6.0


def test_a_state_of_the_base_alone_that_it_loads_by_itself_is_refused_with_the_way_out():
    net, opt = build("sgd")
    alone = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    opt.base_optimizer.load_state_dict(alone.state_dict())
    backward(net, 0)
    with pytest.raises(ValueError, match="lacks 'rho'.*load_state_dict of this optimizer"):
        opt.first_step()
    net, opt = build("sgd")
    opt.load_state_dict(alone.state_dict())
    assert opt.param_groups[0]["rho"] == 0.1 and opt.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("base", BASES)
def test_a_step_of_the_base_itself_is_a_plain_step(base):
    net, opt = build(base)
    other, beside = build(base)
    for i in range(6):
        if i % 3 == 1:
            backward(net, i)
            opt.step()
            backward(other, i)
            beside.base_optimizer.step()
        else:
            step(net, opt, i)
            step(other, beside, i)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_own_foreach_takes_its_count_from_the_saved_state_alone(kind):
    """The trap of docs/drop-in.md."""
    net, _ = build("adamw")
    opt = SAM(net.parameters(), kind, lr=0.01, foreach=True)
    step(net, opt, 0)
    backward(net, 1)
    with pytest.raises(RuntimeError, match="`step` tensors"):
        opt.base_optimizer.step()
    alone = kind(net.parameters(), lr=0.01, foreach=True)
    alone.load_state_dict(opt.base_optimizer.state_dict())
    with pytest.raises(RuntimeError, match="`step` tensors"):
        alone.step()
    alone.load_state_dict(opt.state_dict())
    alone.step()
    assert alone.state[net.bias]["step"] == 2.0


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
@pytest.mark.parametrize("base", FUSED)
def test_step_hooks_of_a_fused_base_are_refused_by_name(base, register):
    kind, hyper = BASES[base]
    params = [nn.Parameter(torch.ones(2))]
    hooked = kind(params, **hyper)
    getattr(hooked, register)(lambda *_: None)
    with pytest.raises(ValueError, match="has step hooks"):
        SAM.wrap(hooked, rho=0.1)

    net, opt = build(base)
    before = copy.deepcopy(net.state_dict())
    handle = getattr(opt.base_optimizer, register)(lambda *_: None)
    backward(net, 0)
    with pytest.raises(ValueError, match="has step hooks"):
        opt.first_step()
    assert all(torch.equal(before[name], x) for name, x in net.state_dict().items())
    handle.remove()
    step(net, opt, 0)


@pytest.mark.parametrize("base", BASES)
def test_step_hooks_run_where_a_base_takes_its_own_step(base):
    kind, hyper = BASES[base]
    own = kind if base == "rmsprop" else type("Own", (kind,), {})
    net, _ = build(base)
    inner = own(net.parameters(), **hyper)
    seen = []
    inner.register_step_pre_hook(lambda *_: seen.append("before"))
    inner.register_step_post_hook(lambda *_: seen.append("after"))
    opt = SAM.wrap(inner, rho=0.1)
    for i in range(2):
        step(net, opt, i)
    assert seen == ["before", "after"] * 2


# ---- a GradScaler's step that raises


def of_somebody_elses(*_):
    raise RuntimeError("somebody else's")


def in_a_hook(opt):
    return opt.register_step_pre_hook(of_somebody_elses).remove


def in_a_hook_of_the_base(opt):
    return opt.base_optimizer.register_step_pre_hook(of_somebody_elses).remove


def at_a_value(opt):
    group, rho = opt.param_groups[0], opt.param_groups[0]["rho"]
    group["rho"] = "0.1"
    return lambda: group.update(rho=rho)


def set_aside(opt):
    opt.stash_grad()
    return opt.unstash_grad


@pytest.mark.parametrize("base, fault", [
    *((base, fault) for base in ("sgd", "rmsprop") for fault in (in_a_hook, at_a_value, set_aside)),
    ("rmsprop", in_a_hook_of_the_base)])
def test_a_scaled_step_that_raised_may_be_tried_again(base, fault):
    (net, opt), (twin, other) = build(base), build(base)
    for n, o in ((net, opt), (twin, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        backward(n, 0, scaler)
        o.first_step(zero_grad=True, scaler=scaler)
        backward(n, 0, scaler)
        if o is opt:
            undo = fault(o)
            with pytest.raises((ValueError, RuntimeError)):
                scaler.step(o)
            undo()
        scaler.step(o)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("told", [True, False, None])  # None: a step without a climb
@pytest.mark.parametrize("after", ["scaler.step", "backward", "closure"])
@pytest.mark.parametrize("base, fault", [
    *((base, fault) for base in ("sgd", "rmsprop") for fault in (in_a_hook, at_a_value)),
    ("rmsprop", in_a_hook_of_the_base)])
def test_a_plain_step_after_a_scaled_one_that_raised_is_refused(base, fault, after, told):
    (net, opt), (twin, other) = build(base), build(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    if told is not None:
        for n, o, s in (net, opt, scaler), (twin, other, None):
            backward(n, 0, s)
            o.first_step(zero_grad=True, scaler=s if told else None)
    backward(net, 0, scaler)
    backward(twin, 0)
    undo = fault(opt)
    with pytest.raises((ValueError, RuntimeError)):
        scaler.step(opt)
    undo()
    with pytest.raises(PhaseError, match="scaler.step"):
        opt.step()
    if after == "scaler.step":
        scaler.step(opt)
        other.step()
    else:
        opt.restore()
        other.restore()
        for n, o in (net, opt), (twin, other):
            if after == "backward":
                backward(n, 1)
                o.step()
            else:
                o.step(lambda n=n: backward(n, 1))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradients_that_a_base_has_stepped_with_are_unscaled():
    net, opt = build("rmsprop")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(net, 0, scaler)
    hook = opt.register_step_post_hook(of_somebody_elses)  # the step is done by then
    with pytest.raises(RuntimeError, match="somebody"):
        scaler.step(opt)
    hook.remove()
    opt.step()
    twin, other = build("rmsprop")
    backward(twin, 0)
    other.step()
    other.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("again", ["scaler.step", "unscale_", "backward", "second restore"])
@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_gradients_of_a_scaled_climb_that_was_given_up_are_still_scaled(base, again):
    (net, opt), (twin, other) = build(base), build(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for n, o, s in ((net, opt, scaler), (twin, other, None)):
        backward(n, 0, s)
        o.first_step(zero_grad=True, scaler=s)
        backward(n, 0, s)
        o.restore()
    if again == "second restore":
        opt.restore()
    if again in ("scaler.step", "second restore"):
        with pytest.raises(PhaseError, match="scaler.step"):
            opt.step()
        scaler.step(opt)
    elif again == "unscale_":
        scaler.unscale_(opt)
        opt.step()
    else:
        for n in net, twin:
            backward(n, 1)
        opt.step()
    other.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("fault", [in_a_hook, at_a_value])
@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_a_skip_that_is_due_comes_where_the_step_was_refused_first(base, fault):
    net, opt = build(base)
    w = [p.detach().clone() for p in net.parameters()]
    for overflow in torch.inf, 1.0:  # of the first micro-batch's climb
        backward(net, 0)
        net.bias.grad.mul_(overflow)
        opt.first_step(zero_grad=True)
        backward(net, 0)
        opt.stash_grad()
    opt.unstash_grad()
    undo = fault(opt)
    with pytest.raises((ValueError, RuntimeError)):
        opt.step()
    undo()
    opt.step()
    assert opt.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), w, strict=True))
    backward(net, 0)
    opt.step()  # the skip is done
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
@pytest.mark.parametrize("closure", [True, False])
def test_a_step_after_a_scaled_one_that_raised_is_not_scaled(base, closure):
    (net, opt), (twin, other) = build(base), build(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(net, 0, scaler)
    if closure:
        with pytest.raises(PhaseError, match="closure"):
            scaler.step(opt, lambda: backward(net, 1))
    else:
        hook = opt.register_step_post_hook(of_somebody_elses)  # the step is done by then
        with pytest.raises(RuntimeError, match="somebody"):
            scaler.step(opt)
        hook.remove()
        backward(twin, 0)
        other.step()
    opt.step(lambda: backward(net, 1))
    other.step(lambda: backward(twin, 1))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_whose_memory_was_moved_are_followed(backend, device):
    net = nn.Linear(3, 2).to(device, torch.bfloat16)
    opt = SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.5, master_weights=True,
              backend=backend)

    def train(i):
        for half in (opt.first_step, opt.second_step):
            net.zero_grad()
            x = torch.arange(12.0).reshape(4, 3).add(i).cos().to(net.weight)
            (net(x) - 1).square().mean().backward()
            half()

    train(0)
    for state in opt.state.values():
        for x in state.values():
            x.data = x.data.clone()
    train(1)
    for p, state in opt.state.items():
        assert torch.equal(state["master"].to(p.dtype), p)


# ---- keys that SAM and the base both have


def a_group_without_the_bases_rho(opt, q):
    opt.param_groups.append({**opt.param_groups[0], "params": [q]})
    del opt.param_groups[1]["base_rho"]


def the_first_without_it(opt, q):
    opt.param_groups.append({**opt.param_groups[0], "params": [q]})
    del opt.param_groups[0]["base_rho"]


def without_either(opt, q):
    opt.param_groups.append({"params": [q], "lr": 0.1})


def deleted(opt, q):
    del opt.param_groups[0]["base_rho"]


@pytest.mark.parametrize("edit", [a_group_without_the_bases_rho, the_first_without_it,
                                  without_either, deleted])
@pytest.mark.parametrize("perturbed", [False, True])
def test_a_group_that_lacks_the_bases_own_value_is_refused_by_name(edit, perturbed):
    """Found while the values were in each other's places, it left them there for good."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = SAM([p], torch.optim.Adadelta, rho=0.05, base_rho=0.9, lr=0.1)
    kept = [dict(opt.param_groups[0])]
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    if perturbed:
        opt.first_step()
    edit(opt, q)
    with pytest.raises((ValueError, PhaseError), match="lacks '(base_)?rho'|perturbed"):
        opt.step()
    if not perturbed:
        for call in (opt.first_step, opt.state_dict):
            with pytest.raises(ValueError, match="lacks '(base_)?rho'"):
                call()
    assert all((group.get("rho", 0.05), group.get("base_rho", 0.9)) == (0.05, 0.9)
               for group in opt.param_groups)
    opt.restore()
    assert torch.equal(p, torch.ones(3)) and torch.equal(q, torch.ones(3))
    opt.param_groups[:] = kept
    opt.first_step()
    assert opt.last_radius == pytest.approx(0.05, rel=1e-5)
    opt.second_step()


def test_a_base_a_group_of_which_lacks_the_value_is_not_wrapped():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    base = torch.optim.Adadelta([p], lr=0.1)
    base.param_groups.append({"params": [q], "lr": 0.1})
    before = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match="lacks 'rho'"):
        SAM.wrap(base, rho=0.1)
    assert base.param_groups == before


class Fails(torch.optim.Adadelta):
    """Fails in the middle of its step, and in adding a group that it has added."""

    def step(self, closure=None):
        assert all(group["rho"] == 0.9 for group in self.param_groups)
        raise ArithmeticError

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            assert [group["rho"] for group in self.param_groups] == [0.9, 0.8]
            raise ArithmeticError


def test_the_values_are_in_their_places_after_a_base_that_fails():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = SAM([p], Fails, rho=0.05, base_rho=0.9, lr=0.1)
    mine = dict(opt.param_groups[0])
    p.grad = torch.ones(3)
    with pytest.raises(ArithmeticError):
        opt.step()
    with pytest.raises(ArithmeticError):
        opt.add_param_group({"params": [q], "base_rho": 0.8})
    assert opt.param_groups == [mine]


def test_what_a_hook_writes_while_the_values_are_exchanged_is_kept():
    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], torch.optim.Adadelta, rho=0.05, base_rho=0.9, lr=0.1)
    hook = opt.base_optimizer.register_step_post_hook(
        lambda base, *_: base.param_groups[0].update(rho=0.7, base_rho=0.2))
    p.grad = torch.ones(3)
    opt.step()
    hook.remove()
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["base_rho"]) == (0.2, 0.7)
    opt.step()
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["base_rho"]) == (0.2, 0.7)


# ---- SAM's own state beside that of a base that is not fused


class Skips(torch.optim.AdamW):
    """Gives up a step whose gradients are not finite."""

    def step(self, closure=None):
        if all(p.grad.isfinite().all() for g in self.param_groups for p in g["params"]):
            super().step()


class Counts(torch.optim.SGD):
    """Keeps an entry that is no parameter's, as MADGRAD does."""

    def step(self, closure=None):
        super().step()
        self.state["k"] = torch.tensor(1.0)


def copied(p, opt):
    return copy.deepcopy((p, opt))


def pickled(p, opt):
    return pickle.loads(pickle.dumps((p, opt)))


def saved(p, opt):
    """By SAM, and loaded into another."""
    other = nn.Parameter(p.detach().clone())
    again = FriendlySAM([other], type(opt.base_optimizer), lr=0.1, lmbda=0.5)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    return other, again


def saved_by_the_base(p, opt):
    other = nn.Parameter(p.detach().clone())
    again = FriendlySAM([other], type(opt.base_optimizer), lr=0.1, lmbda=0.5)
    again.base_optimizer.load_state_dict(copy.deepcopy(opt.base_optimizer.state_dict()))
    return other, again


def another_layout(p, opt):
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    del opt.param_groups[1]
    return p, opt


def as_it_is(p, opt):
    return p, opt


def climb_and_step(p, opt, g, second):
    p.grad = g.clone()
    opt.first_step()
    p.grad = second.clone()
    opt.second_step()


@pytest.mark.parametrize("way, skips", [
    (way, n) for way in (as_it_is, copied, pickled, saved, another_layout) for n in (0, 1, 2)
] + [(saved_by_the_base, 0)])
def test_a_base_that_skips_its_first_steps_sets_its_state_up_later(way, skips):
    """As it does alone; and the average, of which every first gradient is a part, goes on."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt, alone, m = FriendlySAM([p], Skips, lr=0.1, lmbda=0.5), Skips([q], lr=0.1), 0
    for i in range(skips + 3):
        second = torch.full((3,), float("inf") if i < skips else 1.0 + i)
        g = torch.arange(1.0, 4.0).add(i).cos()
        m = 0.5 * m + 0.5 * g
        climb_and_step(p, opt, g, second)
        q.grad = second
        alone.step()
        assert torch.equal(p, q)
        torch.testing.assert_close(opt.state_dict()["state"][0]["sam_ema"], m)
        assert ("sam_ema" in opt.state[p]) == (i >= skips)
        p, opt = way(p, opt)


def test_the_base_itself_may_step_after_a_skip():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt, alone = FriendlySAM([p], Skips, lr=0.1), Skips([q], lr=0.1)
    climb_and_step(p, opt, torch.ones(3), torch.full((3,), float("inf")))
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    opt.base_optimizer.step()
    alone.step()
    assert torch.equal(p, q)


def test_a_state_of_which_only_the_average_is_left_begins_anew_in_the_base():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt, alone = FriendlySAM([p], Skips, lr=0.1), Skips([q], lr=0.1)
    for _ in range(2):
        climb_and_step(p, opt, torch.ones(3), torch.ones(3))
        q.grad = torch.ones(3)
        alone.step()
        for name in ("step", "exp_avg", "exp_avg_sq"):
            del opt.state[p][name]
        alone.state.clear()
        m = opt.state[p]["sam_ema"]
    assert torch.equal(p, q) and m.all()


class Plain(torch.optim.SGD):
    """Keeps nothing, and fails without a learning rate."""

    def step(self, closure=None):
        assert not self.state
        if not self.param_groups[0]["lr"]:
            raise ArithmeticError
        for p in self.param_groups[0]["params"]:
            self.written(p).sub_(p.grad, alpha=self.param_groups[0]["lr"])

    def written(self, p):
        return p


class Data(Plain):
    """Writes as old code does, which torch does not count."""

    def written(self, p):
        return p.data


@pytest.mark.parametrize("base", [Plain, Data])
def test_the_average_beside_a_base_that_keeps_nothing_and_fails(base):
    p = nn.Parameter(torch.ones(3))
    opt = FriendlySAM([p], base, lr=0.1)
    climb_and_step(p, opt, torch.ones(3), torch.ones(3))
    m = opt.state[p]["sam_ema"]
    opt.param_groups[0]["lr"] = 0.0
    with pytest.raises(ArithmeticError):
        opt.step()
    assert opt.state[p]["sam_ema"] is m and m.all()


@pytest.mark.parametrize("base", [Counts, torch.optim.RMSprop])
@pytest.mark.parametrize("clear", [lambda opt, p: opt.state.clear(),
                                   lambda opt, p: opt.state.pop(p)])
def test_an_average_begins_anew_once_where_the_state_is_cleared(base, clear):
    """And not again in the second half of that step."""
    p = nn.Parameter(torch.ones(3))
    opt = FriendlySAM([p], base, lr=0.0, lmbda=0.5, momentum=0.9)
    for g in (1.0, 2.0):
        climb_and_step(p, opt, torch.full((3,), g), torch.ones(3))
    clear(opt, p)
    opt.state["k"] = torch.tensor(0.0)
    for g, m in ((4.0, 2.0), (4.0, 3.0)):
        climb_and_step(p, opt, torch.full((3,), g), torch.ones(3))
        torch.testing.assert_close(opt.state[p]["sam_ema"], torch.full((3,), m))
