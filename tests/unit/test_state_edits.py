"""Whatever is done to `state` between steps, or between the two halves of one, is followed as
torch's optimizers follow it, or refused by name before a weight changes."""

import copy
import pickle
import sys
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fastsam import SAM, FriendlySAM, PhaseError
from fastsam.memory import same

from ..helpers.beside import BASES, Beside, close

BUFFER = {"sgd": "momentum_buffer", "adamw": "exp_avg"}


# ---- followed


def clear(opt, params):
    opt.state.clear()


def another_dict(opt, params):
    opt.state = defaultdict(dict)


def a_copy(opt, params):
    opt.state = defaultdict(dict, {p: dict(entry) for p, entry in opt.state.items()})


def cloned_tensors(opt, params):
    opt.state = defaultdict(dict, {p: {k: x.clone() if isinstance(x, torch.Tensor) else x
                                       for k, x in entry.items()}
                                   for p, entry in opt.state.items()})


def pop_an_entry(opt, params):
    opt.state.pop(params[0])


def empty_an_entry(opt, params):
    opt.state[params[0]].clear()


def swap_entries(opt, params):
    a, b = params[1], params[3]
    opt.state[a], opt.state[b] = opt.state[b], opt.state[a]


def swap_tensors(opt, params):
    a, b = opt.state[params[1]], opt.state[params[3]]
    for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        if name in a:
            a[name], b[name] = b[name], a[name]


def replaced(change):
    def edit(opt, params):
        for entry in opt.state.values():
            for name in ("momentum_buffer", "exp_avg"):
                if entry.get(name) is not None:
                    entry[name] = change(entry[name])
    edit.__name__ = change.__name__
    return edit


def doubled(x):
    return 2 * x


def in_float64(x):
    return x.double() / 3


def transposed(x):
    return x.t().contiguous().t() if x.ndim == 2 else x.clone()


def with_gaps(x):
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    return wide[..., ::2].copy_(x)


def expanded(x):
    return x.flatten()[0].expand(x.shape)


def negated(x):
    return torch._neg_view(x)


def with_a_graph(x):
    return x.detach().requires_grad_() * 1.5


def fill_in_place(opt, params):
    for entry in opt.state.values():
        for name in ("momentum_buffer", "exp_avg"):
            if name in entry:
                entry[name].mul_(-0.5)


def foreign_keys(opt, params):
    opt.state[params[0]]["mine"] = "kept"
    opt.state["somebody's"] = {"number": 3}


FOLLOWED = [clear, another_dict, a_copy, cloned_tensors, pop_an_entry, empty_an_entry,
            swap_entries, swap_tensors, fill_in_place, foreign_keys,
            *map(replaced, (doubled, in_float64, transposed, with_gaps, expanded, negated,
                            with_a_graph))]
IN_PLACE = (negated, expanded, with_a_graph)  # torch would write into them; ours are copies


def as_torch_can(edit):
    """The same edit with a tensor of its own, which torch's optimizers can write into."""
    names = [f.__name__ for f in (*IN_PLACE, in_float64)]
    if edit.__name__ not in names:
        return edit

    def twin(opt, params):
        edit(opt, params)
        for entry in opt.state.values():
            for name in ("momentum_buffer", "exp_avg"):
                if name in entry:
                    entry[name] = torch.empty(entry[name].shape).copy_(entry[name].detach())
    return twin


def edit_both(pair, edit):
    edit(pair.ours.opt, pair.ours.params)
    as_torch_can(edit)(pair.torch.opt, pair.torch.params)


@pytest.mark.parametrize("edit", FOLLOWED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.interpreted(base=["sgd"])
def test_an_edited_state_is_followed(edit, base, backend):
    pair = Beside(base, backend)
    pair.step(2)
    edit_both(pair, edit)
    pair.step(2)


@pytest.mark.parametrize("edit", FOLLOWED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_a_state_edited_while_perturbed_is_followed(edit, base):
    if base == "rmsprop" and edit.__name__ == "expanded":
        return  # torch's RMSprop cannot write into it
    pair = Beside(base, "reference")
    pair.step(2)
    pair.climb()
    edit_both(pair, edit)
    pair.descend()
    pair.step()


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("of_some", [False, True])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_state_that_is_put_aside_stays_as_it_is_until_it_is_put_back(
        base, of_some, perturbed, backend):
    """As where several tasks have a state each: the whole, or the entries of two parameters."""
    pair = Beside(base, backend)

    def edit(what):
        if perturbed:
            pair.climb()
        pair.both(what)
        if perturbed:
            pair.descend()

    aside = {}

    def put_aside(opt, params):
        members = params[1:3] if of_some else params[:4]
        aside[opt] = {p: opt.state.pop(p) for p in members}

    pair.step(2)
    edit(put_aside)
    before = [x.clone() for entry in aside[pair.ours.opt].values() for x in entry.values()]
    pair.step(2)
    after = [x for entry in aside[pair.ours.opt].values() for x in entry.values()]
    assert all(map(torch.equal, before, after))
    edit(lambda opt, params: opt.state.update(aside[opt]))
    pair.step(2)


def test_a_momentum_under_another_name_is_none(backend):
    pair = Beside("sgd", backend)

    def rename(old, new):
        def edit(opt, params):
            for entry in opt.state.values():
                entry[new] = entry.pop(old)
        return edit

    pair.step(2)
    pair.both(rename("momentum_buffer", "first task's"))
    pair.step(2)
    pair.both(rename("first task's", "momentum_buffer"))
    pair.step(2)


def test_a_live_state_dict_stays_as_it_is_when_another_is_loaded(backend):
    pair = Beside("adamw", backend)
    pair.step()
    first = copy.deepcopy([side.opt.state_dict() for side in (pair.ours, pair.torch)])
    pair.step()
    live = [side.opt.state_dict() for side in (pair.ours, pair.torch)]
    for opt, state in zip((pair.ours.opt, pair.torch.opt), first, strict=True):
        opt.load_state_dict(state)
    pair.step()
    for opt, state in zip((pair.ours.opt, pair.torch.opt), live, strict=True):
        opt.load_state_dict(state)
    pair.compare()
    pair.step()


def test_what_is_held_stays_alive_where_another_entry_is_replaced(backend):
    """And what is replaced costs no new layout."""
    pair = Beside("sgd", backend)
    pair.step()
    held = [side.opt.state[side.params[0]]["momentum_buffer"] for side in (pair.ours, pair.torch)]

    def replace(opt, params):
        opt.state[params[1]]["momentum_buffer"] = opt.state[params[1]]["momentum_buffer"] * 0.5

    spaces = pair.ours.opt.spaces
    for _ in range(3):
        pair.both(replace)
        pair.step()
        close(*held, "the momentum that is held")
    assert pair.ours.opt.spaces is spaces


def t_(x):
    x.t_()


def data_t(x):
    x.data = x.data.t()


def data_negated(x):
    x.data = torch._neg_view(x.data)


@pytest.mark.parametrize("turn", [t_, data_t, data_negated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_an_average_that_is_turned_where_it_lies_is_followed(base, turn, backend):
    """One of a square weight, whose address and shape stay."""
    cls, hyper = BASES[base]
    p, q = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    ours, theirs = SAM([p], cls, rho=0.5, backend=backend, **hyper), cls([q], **hyper)
    for t in range(4):
        g = torch.tensor([[1.0, 2.0], [3.0, -4.0]]) / (t + 1)
        for w, opt in ((p, ours), (q, theirs)):
            if t == 2:
                turn(opt.state[w][BUFFER[base]])
            w.grad = g.clone()
        ours.first_step()
        ours.second_step()
        theirs.step()
        close(p, q, f"step {t}")


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_an_edited_state_is_what_is_saved(base):
    pair = Beside(base, "reference")
    pair.step(2)
    for edit in (fill_in_place, swap_entries, replaced(doubled), foreign_keys):
        edit_both(pair, edit)
        saved, theirs = pair.ours.opt.state_dict(), pair.torch.opt.state_dict()
        for i, entry in theirs["state"].items():
            for name, x in entry.items():
                mine = saved["state"][i][name]
                if isinstance(x, torch.Tensor):
                    torch.testing.assert_close(mine.detach(), x, rtol=1e-5, atol=1e-6)
                else:
                    assert mine == x
        pair.step()
    pair.both(clear)
    for entry in pair.ours.opt.state_dict()["state"].values():
        assert not isinstance(entry, dict) or not any(
            x.any() for name, x in entry.items() if isinstance(x, torch.Tensor))


def test_what_others_keep_in_the_state_is_saved_and_loaded():
    pair = Beside("sgd", "reference")
    pair.step()
    opt, twin = pair.ours.opt, Beside("sgd", "reference")
    foreign_keys(opt, pair.ours.params)
    opt.state["number"] = 5
    pair.step()
    twin.ours.opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    state = twin.ours.opt.state
    assert state[twin.ours.params[0]]["mine"] == "kept"
    assert state["somebody's"] == {"number": 3} and state["number"] == 5
    assert torch.equal(state[twin.ours.params[0]]["momentum_buffer"],
                       opt.state[pair.ours.params[0]]["momentum_buffer"])


class Quantized(torch.optim.SGD):
    """A base that keeps its momentum in a tensor of another class, as torchao's optimizers do."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["v"] = TwoTensor(p.grad.clone(), p.grad.clone())
        return super().step(closure)


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), TwoTensor(torch.ones(2), torch.ones(2))],
                         ids=["sparse", "subclass"])
@pytest.mark.parametrize("cls, base", [(SAM, torch.optim.SGD), (SAM, Quantized),
                                       (FriendlySAM, Quantized)])
def test_tensors_without_a_storage_of_their_own_may_be_in_the_state(cls, base, odd):
    p = nn.Parameter(torch.ones(3))
    opt = cls([p], base, lr=0.1, momentum=0.9)
    both_halves(opt, p)
    opt.state[p]["odd"] = odd
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin = copied(opt)
        entry, = (x for x in twin.state.values() if "odd" in x)
        assert type(entry["odd"]) is type(odd)
    opt.load_state_dict(opt.state_dict())
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    before = p.detach().clone()
    both_halves(opt, p)
    assert type(opt.state[p]["odd"]) is type(odd) and not torch.equal(p, before)


def both_halves(opt, p):
    for half in (opt.first_step, opt.second_step):
        p.grad = p.detach().clone()
        half()


@pytest.mark.parametrize("value", [7, 7.0, torch.tensor(7.0), torch.tensor([7]),
                                   torch.tensor(7, dtype=torch.int64)], ids=repr)
def test_adams_step_may_be_replaced(value, backend):
    pair = Beside("adamw", backend)
    pair.step(2)
    for entry in pair.ours.opt.state.values():
        entry["step"] = copy.deepcopy(value)
    for entry in pair.torch.opt.state.values():
        entry["step"] = torch.tensor(7.0)
    pair.step(2)


def test_adams_step_may_be_counted_in_place(backend):
    pair = Beside("adamw", backend)
    pair.step()
    pair.both(lambda opt, params: [entry["step"].add_(10) for entry in opt.state.values()])
    pair.step(2)


def test_popped_momentum_begins_anew(backend):
    pair = Beside("sgd", backend)
    pair.step(2)
    pair.both(lambda opt, params: opt.state[params[0]].pop("momentum_buffer"))
    pair.step(2)
    pair.both(lambda opt, params: opt.state[params[0]].update(momentum_buffer=None))
    pair.step(2)


def test_momentum_that_was_given_to_a_stranger_begins_anew(backend):
    pair = Beside("sgd", backend)
    pair.step(2)
    pair.both(lambda opt, params: opt.state.update(
        stranger=opt.state.pop(list(opt.state)[-1])))
    pair.step(2)


@pytest.mark.parametrize("edit", [clear, another_dict, pop_an_entry])
def test_the_average_begins_anew_with_the_state(edit, backend):
    pair = Beside("sgd", backend, make=FriendlySAM, lmbda=0.5)
    pair.step(2)
    opt, (p, *_) = pair.ours.opt, pair.ours.params
    edit(opt, pair.ours.params)
    g = pair.gradients(3)
    pair.set(pair.ours, g)
    opt.first_step()
    opt.restore()
    torch.testing.assert_close(opt.state[p]["ema"], 0.5 * g[0])
    assert int(opt.state[p]["ema_steps"]) == 1


def test_the_average_may_be_replaced_in_another_form(backend):
    pair = Beside("sgd", backend, make=FriendlySAM, lmbda=0.5)
    pair.step()
    opt, (p, *_) = pair.ours.opt, pair.ours.params
    opt.state[p]["ema"] = torch.full((4, 3), 2.0, dtype=torch.float64).t()
    g = pair.gradients(3)
    pair.set(pair.ours, g)
    opt.first_step()
    opt.restore()
    torch.testing.assert_close(opt.state[p]["ema"], 1 + 0.5 * g[0])


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("what", ["momentum_buffer", "exp_avg", "exp_avg_sq", "step"])
def test_a_buffer_whose_memory_was_moved_is_followed(what, perturbed, backend):
    """As offloading to the host does with `.data`."""
    base = "sgd" if what == "momentum_buffer" else "adamw"
    pair = Beside(base, backend)
    pair.step(2)

    def move(opt, params):
        for entry in opt.state.values():
            entry[what].data = entry[what].data * 3

    if perturbed:
        pair.climb()
        pair.both(move)
        pair.descend()
    else:
        pair.both(move)
    pair.step(2)


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RAdam])
def test_a_count_whose_memory_was_moved_is_followed(base, perturbed, backend, device):
    """As one that is set to another number where it lies."""
    own = dict(momentum=0.9) if base is torch.optim.SGD else {}

    def trained(begin_anew):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(5, device=device)) for _ in range(2)]
        opt = FriendlySAM(ps, base, lr=0.1, convention="official", backend=backend, **own)
        for t in range(5):
            for half in (opt.first_step, opt.second_step):
                opt.zero_grad()
                sum((p**4).sum() for p in ps).backward()
                half()
                if t == 2 and (half == opt.first_step) is perturbed:
                    entry = opt.state[ps[1]]
                    for name in entry.keys() & {"step", "ema_steps", "sam_ema_steps"}:
                        begin_anew(entry[name])
        return [*ps, *opt.state[ps[0]].values(), *opt.state[ps[1]].values()]

    def elsewhere(count):
        count.data = torch.zeros_like(count)

    for ours, right in zip(trained(elsewhere), trained(torch.Tensor.zero_), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("perturbed", [False, True])
def test_a_count_of_dampened_momentum_whose_memory_was_moved_is_followed(perturbed, later, backend):
    """At a count of 0 the momentum is the gradient; `later`: dampening comes with the edit."""
    def trained(begin_anew):
        p = nn.Parameter(torch.ones(3))
        opt = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.5, dampening=0.0 if later else 0.5,
                  backend=backend)

        def edit():
            opt.param_groups[0]["dampening"] = 0.5
            begin_anew(opt.state[p]["momentum_steps"])

        for t in range(4):
            p.grad = torch.full((3,), 1.0 + t)
            if t == 2 and not perturbed:
                edit()
            opt.first_step()
            if t == 2 and perturbed:
                edit()
            opt.second_step()
            if t == 2:
                assert opt.state[p]["momentum_buffer"].tolist() == [3.0] * 3
        return [p, *opt.state[p].values()]

    def elsewhere(count):
        count.data = torch.zeros_like(count)

    for ours, right in zip(trained(elsewhere), trained(torch.Tensor.zero_), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_buffer_that_is_shared_with_processes_stays_shared(base, backend):
    """As asynchronous training does once, before it forks."""
    pair = Beside(base, backend)
    pair.step(2)
    shared = [entry[BUFFER[base]].share_memory_() for entry in pair.ours.opt.state.values()]
    pair.step(2)
    assert all(entry[BUFFER[base]] is t and t.is_shared() for entry, t in zip(
        pair.ours.opt.state.values(), shared, strict=True))


# ---- refused


def set_in_first(name, value):
    def edit(opt, params):
        opt.state[params[0]][name] = value
    return edit


def pop_from_first(name):
    return lambda opt, params: opt.state[params[0]].pop(name)


REFUSED = {  # name: base, edit, message
    "a list": ("sgd", set_in_first("momentum_buffer", [1.0]), "momentum_buffer.*list"),
    "a number": ("sgd", set_in_first("momentum_buffer", 0.0), "momentum_buffer.*float"),
    "another shape": ("sgd", set_in_first("momentum_buffer", torch.ones(4, 3)), "does not fit"),
    "one element": ("sgd", set_in_first("momentum_buffer", torch.ones(())), "does not fit"),
    "no memory": ("sgd", set_in_first("momentum_buffer", torch.ones(3, 4, device="meta")),
                  "momentum_buffer.*meta"),
    "complex": ("sgd", set_in_first("momentum_buffer", torch.ones(3, 4, dtype=torch.complex64)),
                "momentum_buffer.*complex64"),
    "sparse": ("sgd", set_in_first("momentum_buffer", torch.ones(3, 4).to_sparse()),
               "momentum_buffer.*sparse"),
    "an entry that is a list": ("sgd", lambda opt, ps: opt.state.update({ps[0]: [1, 2]}), "list"),
    "a state that is a list": ("sgd", lambda opt, ps: setattr(opt, "state", []), "list"),
    "no exp_avg": ("adamw", pop_from_first("exp_avg"), "'exp_avg'"),
    "no exp_avg_sq": ("adamw", pop_from_first("exp_avg_sq"), "'exp_avg_sq'"),
    "no step": ("adamw", pop_from_first("step"), "'step'"),
    "exp_avg is None": ("adamw", set_in_first("exp_avg", None), "'exp_avg'"),
    "step is None": ("adamw", set_in_first("step", None), "step=None"),
    "step is a word": ("adamw", set_in_first("step", "seven"), "step='seven'"),
    "step is negative": ("adamw", set_in_first("step", -1), "step=-1"),
    "step is nan": ("adamw", set_in_first("step", float("nan")), "step=nan"),
    "step has two elements": ("adamw", set_in_first("step", torch.ones(2)), "step.*shape"),
    "freed": ("sgd", lambda opt, ps: opt.state[ps[0]]["momentum_buffer"].untyped_storage(
        ).resize_(0), "momentum_buffer.*lost its memory"),
    "exp_avg_sq of another shape": ("adamw", set_in_first("exp_avg_sq", torch.ones(3)),
                                    "does not fit"),
}


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.interpreted(perturbed=[True])
def test_a_state_that_is_refused_changes_nothing(name, perturbed, backend):
    base, edit, match = REFUSED[name]
    pair = Beside(base, backend)
    pair.step(2)
    side = pair.ours
    if perturbed:
        pair.climb()
    weights = [p.detach().clone() for p in side.params]
    kept = defaultdict(dict, {p: {k: x.clone() for k, x in entry.items()}
                              for p, entry in side.opt.state.items()})
    edit(side.opt, side.params)
    pair.set(side, pair.gradients(5))
    for call in ((side.opt.step,) if perturbed else (side.opt.first_step, side.opt.step)):
        with pytest.raises(ValueError, match=match):
            call()
        assert side.opt.is_perturbed == perturbed
        assert all(torch.equal(p, w) for p, w in zip(side.params, weights, strict=True))
    if perturbed:
        pair.restored()
    side.opt.state = kept
    pair.step(2)


def cleared(state):
    state.clear()


def moved(state):
    for entry in state.values():
        entry["momentum_buffer"].data = torch.zeros(4)


@pytest.mark.parametrize("edit", [cleared, moved])
def test_the_state_of_masters_may_change_between_steps_only(edit, backend):
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = SAM([p], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, master_weights=True,
              backend=backend)
    p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    opt.state[p]["master"] = torch.full((4,), 2.0)
    with torch.no_grad():
        p.fill_(2)
    opt.step()
    torch.testing.assert_close(opt.state[p]["master"], torch.full((4,), 2 - 0.1 * 1.9))
    w = p.detach().clone()
    opt.first_step()
    edit(opt.state)
    with pytest.raises(PhaseError, match="masters"):
        opt.second_step()
    opt.restore()
    assert torch.equal(p, w)


# ---- what docs/drop-in.md says that differs from torch


def test_a_tensor_that_was_assigned_is_copied():
    p = nn.Parameter(torch.ones(1))
    opt = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.5)
    mine = opt.state[p]["momentum_buffer"] = torch.full((1,), 4.0)
    p.grad = torch.ones(1)
    opt.step()  # v = 0.5 * 4 + 1
    mine.zero_()
    assert opt.state[p]["momentum_buffer"].item() == 3
    opt.state[p]["momentum_buffer"].zero_()
    opt.step()
    assert opt.state[p]["momentum_buffer"].item() == 1


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dampening, in_place", [(0.0, 3.0), (0.5, 1.0)])
def test_a_momentum_that_is_given_before_the_first_update(dampening, in_place, held, backend):
    for assigned, v in ((True, 2 + 1 - dampening), (False, in_place)):
        p = nn.Parameter(torch.ones(1))
        opt = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.5, dampening=dampening,
                  backend=backend)
        before = opt.state[p]["momentum_buffer"] if held else None
        if assigned:
            opt.state[p]["momentum_buffer"] = torch.full((1,), 4.0)
        else:
            opt.state[p]["momentum_buffer"].fill_(4.0)
        p.grad = torch.ones(1)
        opt.step()
        assert opt.state[p]["momentum_buffer"].item() == v
        assert before is None or before.item() == (0 if assigned else v)


# ---- what is equal is not the same


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_an_equal_tensor_of_one_element_is_another(backend):
    p, twin = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    opt = SAM([p], torch.optim.SGD, rho=0, backend=backend, lr=0.1, momentum=0.9)
    base = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    for _ in range(3):
        for optimizer, w in ((opt, p), (base, twin)):
            state = optimizer.state[w]
            if state:
                state["momentum_buffer"] = state["momentum_buffer"].clone()
            w.grad = torch.ones(1)
            optimizer.step()
        torch.testing.assert_close(opt.state[p]["momentum_buffer"],
                                   base.state[twin]["momentum_buffer"], rtol=1e-6, atol=0)
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_an_equal_parameter_of_one_element_is_another(backend):
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    opt = SAM([p], torch.optim.SGD, rho=0, backend=backend, lr=0.5)
    p.grad = q.grad = torch.ones(1)
    opt.step()
    with torch.no_grad():
        q.copy_(p)
    opt.param_groups[0]["params"][0] = q
    opt.step()
    assert (float(p), float(q)) == (0.5, 0.0)


class Incomparable:
    def __eq__(self, other):
        raise RuntimeError("never compared")

    __hash__ = None


def test_what_cannot_be_compared_may_lie_in_the_state():
    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], torch.optim.SGD, backend="reference", lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = torch.ones(3)
        opt.first_step()
        opt.state[p]["mine"] = Incomparable()
        p.grad = torch.ones(3)
        opt.second_step()
        assert isinstance(opt.state[p]["mine"], Incomparable)


@pytest.mark.parametrize("call", ["_push_on_torch_function_stack", "_pop_torch_function_stack"])
def test_a_ctrl_c_while_things_are_compared_leaves_torch_as_it_was(call):
    """Python looks for one after each call of a function in C."""
    def interrupt(frame, event, called):
        if event == "c_return" and called.__name__ == call:
            sys.setprofile(None)
            raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            same([1], [1])
    finally:
        sys.setprofile(before)
    left = torch._C._len_torch_function_stack()
    for _ in range(left):
        torch._C._pop_torch_function_stack()
    assert left == 0
